#include "conv_vector_avx2.h"

#include "network_square_body.h"

namespace narrowcast {

const NetworkKernels network_avxvnni_evex = make_network_kernels();

}  // namespace narrowcast
