#include "conv_vector_avx512.h"

#include "recurrent_body.h"

namespace narrowcast {

const RecurrentKernels recurrent_avx512vnni = make_recurrent_kernels();

}  // namespace narrowcast
