#include "conv_vector_neon.h"

#include "recurrent_body.h"

namespace narrowcast {

const RecurrentKernels recurrent_neondot = make_recurrent_kernels();

}  // namespace narrowcast
