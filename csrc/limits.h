// What the machine can do at most: multiply-accumulate loops without memory, and reads without arithmetic. Benchmarks
// print every result as a fraction of these; nothing else calls them.
#pragma once

#include <stdint.h>

namespace narrowcast {

struct LimitKernels {
  // Each runs `iterations` rounds of independent instructions and returns the multiply-accumulates done.
  int64_t (*multiply_int8)(int64_t iterations);     // uint8 x int8 -> int32
  int64_t (*multiply_float32)(int64_t iterations);  // fused multiply-add
  int64_t (*multiply_bfloat16)(int64_t iterations);  // bfloat16 pairs -> float32; null where the tier has none
  // Reads [data, data + bytes) `repeats` times; bytes is a multiple of 1024.
  void (*read)(const void* data, int64_t bytes, int64_t repeats);
};

extern const LimitKernels kLimitsAvx2, kLimitsAvx512vnni;

}  // namespace narrowcast
