// The limits of AVX-VNNI: vpdpbusd on 256 bits.
#define NARROWCAST_DOT(sum, a, b) _mm256_dpbusd_avx_epi32(sum, a, b)
#include "limits_body_256.h"

namespace narrowcast {

extern const LimitKernels kLimitsAvxvnni{multiply_int8, multiply_float32, nullptr, read};

}  // namespace narrowcast
