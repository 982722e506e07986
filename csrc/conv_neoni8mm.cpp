#include "conv_vector_neon.h"

#include "conv_depthwise_body.h"

namespace narrowcast {

const ConvKernels conv_neoni8mm = make_conv_kernels();

}  // namespace narrowcast
