// Activation quantizers: float32, bfloat16 or float16 values to 8-bit codes. All tiers give the same bits.
#pragma once

#include "kernels.h"

namespace narrowcast {

// Bit pattern of +infinity: a larger or equal absmax_bits result means that a value is not finite.
constexpr uint32_t kNonFiniteBits = 0x7f800000u;
// Bit pattern of 2^-100: a smaller largest magnitude counts as all zero, since 127 / range would overflow.
constexpr uint32_t kSmallestRangeBits = 0x0d800000u;
constexpr int64_t kActivationGroup = 32;

struct QuantizeKernels {
  // The largest |x| as the bit pattern of a float32; >= kNonFiniteBits when a value is NaN or infinite.
  uint32_t (*absmax_bits)(const void* x, FloatType type, int64_t count);

  // The smallest and the largest of the values and 0. False when a value is not finite.
  bool (*range)(const void* x, FloatType type, int64_t count, float* low, float* high);

  // codes = clamp(rne(x * inverse) + zero_point, 0, 255). False when a value is not finite.
  bool (*to_uint8)(const void* x, FloatType type, int64_t count, float inverse, int32_t zero_point, uint8_t* codes);

  // The same with inverse[k] and zero_point[k] for element k.
  bool (*to_uint8_channels)(const void* x, FloatType type, int64_t count, const float* inverse,
                            const int32_t* zero_point, uint8_t* codes);

  // Symmetric int8 per group of 32 of one row, with 128 added. Writes ceil(count / 32) groups: 32 codes each (128 past the
  // end) and their scale. False when a value is not finite.
  bool (*to_uint8_groups)(const void* x, FloatType type, int64_t count, uint8_t* codes, float* scales);
};

extern const QuantizeKernels quantize_scalar;
extern const QuantizeKernels quantize_avx2;
extern const QuantizeKernels quantize_avx512vnni;
extern const QuantizeKernels quantize_neondot;

constexpr Tiers<QuantizeKernels> kQuantizeTiers = {
    .scalar = &quantize_scalar,
    .avx2 = NARROWCAST_X86_BODY(quantize_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(quantize_avx512vnni),
    .neondot = NARROWCAST_ARM_BODY(quantize_neondot),
};

}  // namespace narrowcast
