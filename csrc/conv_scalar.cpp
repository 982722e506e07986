#include "conv_vector_scalar.h"

#include "conv_depthwise_body.h"

namespace narrowcast {

const ConvKernels conv_scalar = make_conv_kernels();

}  // namespace narrowcast
