// What the machine can do at most: multiply-accumulate loops without memory, and reads without arithmetic. Benchmarks
// print every result as a fraction of these; nothing else calls them.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace narrowcast {

// A null function: the tier has no such loop.
struct LimitKernels {
  // Each runs `iterations` rounds of independent instructions and returns the multiply-accumulates done.
  int64_t (*multiply_int8)(int64_t iterations);      // uint8 x int8 -> int32
  int64_t (*multiply_float32)(int64_t iterations);   // fused multiply-add
  int64_t (*multiply_bfloat16)(int64_t iterations);  // bfloat16 pairs -> float32
  // Reads [data, data + bytes) `repeats` times; bytes is a multiple of 1024.
  void (*read)(const void* data, int64_t bytes, int64_t repeats);
};

extern const LimitKernels kLimitsScalar, kLimitsAvx2, kLimitsAvxvnni, kLimitsAvxvnniEvex, kLimitsAvx512vnni, kLimitsNeondot;

// The tier neoni8mm is measured in sdot, whose peak its own instructions may exceed.
constexpr Tiers<LimitKernels> kLimitTiers = {
    .scalar = &kLimitsScalar,
    .avx2 = NARROWCAST_X86_BODY(kLimitsAvx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(kLimitsAvxvnniEvex),
    .avxvnni = NARROWCAST_X86_BODY(kLimitsAvxvnni),
    .avx512vnni = NARROWCAST_X86_BODY(kLimitsAvx512vnni),
    .neondot = NARROWCAST_ARM_BODY(kLimitsNeondot),
};

}  // namespace narrowcast
