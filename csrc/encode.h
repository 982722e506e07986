// Quantizing weights: range, scale and zero point per group of a row, codes, the error, packing. All tiers give the
// bits of the torch functions in core/affine.py and core/packing.py.
#pragma once

#include "kernels.h"

namespace narrowcast {

// How scales are stored, in the order of SCALE_FORMATS in core/spec.py.
enum class ScaleFormat : int { fp32 = 0, fp16 = 1, e8m0 = 2 };

// The codes of a signed integer format.
struct CodeBounds {
  float low, high;   // the codes in use: -127..127 when symmetric, -128..127 when not
  bool symmetric;
  ScaleFormat scale;
};

struct EncodeKernels {
  // Scale and zero point of every group of one row. A group with a value that is not finite, or whose scale does not
  // fit its format, gets a scale that is not finite.
  void (*choose)(const float* values, int64_t columns, int64_t group, const CodeBounds& range, float* scale,
                 int32_t* zero_point);

  // codes = clamp(rne(value / scale) + zero_point); zero_point is null when symmetric.
  void (*encode)(const float* values, int64_t columns, int64_t group, const CodeBounds& range, const float* scale,
                 const int32_t* zero_point, int8_t* codes);

  // Adds the row's sum of value^2 and of (value - decoded)^2.
  void (*error)(const float* values, const int8_t* codes, int64_t columns, int64_t group, const float* scale,
                const int32_t* zero_point, double* signal, double* noise);

  // One row of bytes `code - offset` to `bits` bits each; false when a code needs more bits. A multiple of 8 codes.
  bool (*pack)(const uint8_t* codes, int64_t count, int bits, int offset, uint8_t* packed);

  // The inverse; a multiple of 8 codes.
  void (*unpack)(const uint8_t* packed, int64_t count, int bits, int offset, uint8_t* codes);
};

extern const EncodeKernels encode_scalar;
extern const EncodeKernels encode_avx2;
extern const EncodeKernels encode_avx512vnni;

constexpr Tiers<EncodeKernels> kEncodeTiers = {
    .scalar = &encode_scalar,
    .avx2 = NARROWCAST_X86_BODY(encode_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(encode_avx512vnni),
};

}  // namespace narrowcast
