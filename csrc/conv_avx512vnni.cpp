#include "conv_vector_avx512.h"

#include "conv_depthwise_body.h"

namespace narrowcast {

const ConvKernels conv_avx512vnni = make_conv_kernels();

}  // namespace narrowcast
