#include "conv_vector_neon.h"

#include "network_square_body.h"

namespace narrowcast {

const NetworkKernels network_neondot = make_network_kernels();

}  // namespace narrowcast
