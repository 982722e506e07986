#include "conv_vector_scalar.h"

#include "recurrent_body.h"

namespace narrowcast {

const RecurrentKernels recurrent_scalar = make_recurrent_kernels();

}  // namespace narrowcast
