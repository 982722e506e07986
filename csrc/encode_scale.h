// Rounding of one scale to its storage format, as core.affine.round_scale does; shared by encode and range search.
#pragma once

#include "encode.h"
#include "float_types.h"

namespace narrowcast {
namespace {

inline float round_scale(float scale, ScaleFormat format) {
  constexpr float tiny = 1.17549435e-38f;  // 2^-126
  if (format == ScaleFormat::fp16) {
    scale = scale < 0x1p-24f ? 0x1p-24f : scale;
    if (scale >= 0x1p-14f) return half_to_float(float_to_half(scale));
    const float steps = scale * 0x1p24f;  // below 2^-14 the next multiple of 2^-24 above
    const auto whole = static_cast<float>(static_cast<int32_t>(steps));
    return (whole < steps ? whole + 1.0f : whole) * 0x1p-24f;
  }
  scale = scale < tiny ? tiny : scale;
  if (format == ScaleFormat::fp32) return scale;
  const uint32_t bits = float_to_bits(scale);  // e8m0: the next power of two
  return bits_to_float((bits & 0x007fffffu) != 0 ? (bits & 0x7f800000u) + 0x00800000u : bits);
}

// Nearest integer, ties to even, for magnitudes up to 2^22.
inline float nearest_integer(float value) { return (value + 12582912.0f) - 12582912.0f; }

inline float clamped(float value, float low, float high) { return value < low ? low : value > high ? high : value; }

}  // namespace
}  // namespace narrowcast
