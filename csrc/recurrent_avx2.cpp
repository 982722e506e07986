#include "conv_vector_avx2.h"

#include "recurrent_body.h"

namespace narrowcast {

const RecurrentKernels recurrent_avx2 = make_recurrent_kernels();

}  // namespace narrowcast
