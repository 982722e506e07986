#include "conv_vector_scalar.h"

#include "network_square_body.h"

namespace narrowcast {

const NetworkKernels network_scalar = make_network_kernels();

}  // namespace narrowcast
