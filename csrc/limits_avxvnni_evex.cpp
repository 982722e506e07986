// The limits of AVX-VNNI on a CPU that has vpdpbusd only in the encoding of AVX-512.
#define NARROWCAST_DOT(sum, a, b) _mm256_dpbusd_epi32(sum, a, b)
#include "limits_body_256.h"

namespace narrowcast {

extern const LimitKernels kLimitsAvxvnniEvex{multiply_int8, multiply_float32, nullptr, read};

}  // namespace narrowcast
