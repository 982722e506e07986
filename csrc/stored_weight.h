// A weight as it is stored, in any format: packed fields or bytes, a scale per group of a row, zero points, levels.
#pragma once

#include "float_types.h"
#include "kernels.h"

namespace narrowcast {

enum class ScaleType : int { float32 = 0, float16 = 1, e8m0 = 2 };

// value[row, k] = (levels[field] where there are levels, else field - zero_point) * scale, one scale per group.
// Levels are the same for the whole weight, or learned: a table of their own for every group of every row.
// A field is the unsigned number in the bits of a code; of a signed byte it is code + 128.
struct StoredWeight {
  const uint8_t* codes;       // [rows, row_bytes], a row is a little-endian stream of bits
  int64_t row_bytes;
  int bits;                   // 2..6, or 8
  bool is_signed;             // bytes of two's complement
  const void* scale;          // [rows, groups], or one row for all
  ScaleType scale_type;
  const void* zero_point;     // like the scales; null for 2^(bits - 1)
  bool zero_is_half;          // float16, where zero points are not whole; else bytes
  const float* levels;        // [2^bits], or [rows, groups, 2^bits] where `levels_stride` is not 0, or null
  int64_t levels_stride;      // floats between two rows' tables
  int64_t scale_stride;       // groups, or 0 where all rows share their scales
  int64_t group;
  int64_t columns;
};

struct ExpandKernels {
  // out[i] = value[row, begin + i] for 0 <= i < count, bit for bit the reference; begin is a multiple of 64.
  void (*expand)(const StoredWeight& weight, int64_t row, int64_t begin, int64_t count, float* out);
};

extern const ExpandKernels expand_scalar;
extern const ExpandKernels expand_avx2;
extern const ExpandKernels expand_avx512vnni;

constexpr Tiers<ExpandKernels> kExpandTiers = {
    .scalar = &expand_scalar,
    .avx2 = NARROWCAST_X86_BODY(expand_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(expand_avx512vnni),
};

namespace {

inline float load_scale(const void* scale, ScaleType type, int64_t index) {
  if (type == ScaleType::float32) return static_cast<const float*>(scale)[index];
  if (type == ScaleType::float16) return half_to_float(static_cast<const uint16_t*>(scale)[index]);
  const uint32_t exponent = static_cast<const uint8_t*>(scale)[index];
  if (exponent == 255) return bits_to_float(0x7fc00000u);
  return bits_to_float(exponent != 0 ? exponent << 23 : 0x00400000u);
}

// The zero point of one group, in steps of the field.
inline float load_zero(const StoredWeight& weight, int64_t index) {
  if (weight.zero_is_half) return half_to_float(static_cast<const uint16_t*>(weight.zero_point)[index]);
  return static_cast<float>(static_cast<const uint8_t*>(weight.zero_point)[index]);
}

// The table of one group of a row.
inline const float* load_levels(const StoredWeight& weight, int64_t row, int64_t group) {
  if (weight.levels_stride == 0) return weight.levels;
  return weight.levels + row * weight.levels_stride + (group << weight.bits);
}

}  // namespace
}  // namespace narrowcast
