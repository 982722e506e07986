#include "conv_vector_avx512.h"

#include "network_square_body.h"

namespace narrowcast {

const NetworkKernels network_avx512vnni = make_network_kernels();

}  // namespace narrowcast
