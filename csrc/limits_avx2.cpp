// The limits of AVX2: three instructions per 32 products of bytes.
#define NARROWCAST_DOT(sum, a, b) \
  _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)))
#include "limits_body_256.h"

namespace narrowcast {

extern const LimitKernels kLimitsAvx2{multiply_int8, multiply_float32, nullptr, read};

}  // namespace narrowcast
