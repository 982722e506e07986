#include "conv_vector_neon.h"

#include "conv_depthwise_body.h"

namespace narrowcast {

const ConvKernels conv_neondot = make_conv_kernels();

}  // namespace narrowcast
