#include "conv_vector_avx2.h"

#include "conv_depthwise_body.h"

namespace narrowcast {

const ConvKernels conv_avxvnni = make_conv_kernels();

}  // namespace narrowcast
