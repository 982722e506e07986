// bfloat16 and float16 <-> float32 one value at a time, by bits; round half to even. For tails and the scalar tier.
#pragma once

#include <string.h>

#include "kernels.h"

namespace narrowcast {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return bits_to_float(sign | (rest + 0x70000000u));  // infinity, NaN
  // Shifting the exponent by a multiplication makes subnormal halves exact too.
  const float magnitude = bits_to_float(rest) * bits_to_float(0x77800000u);  // 2^112
  return bits_to_float(sign | float_to_bits(magnitude));
}

inline uint16_t float_to_half(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal half: the adder aligns and rounds the mantissa
    const float shifted = bits_to_float(magnitude) + bits_to_float(0x3f000000u);  // 0.5
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load_float(const void* data, FloatType type, int64_t index) {
  if (type == FloatType::float32) return static_cast<const float*>(data)[index];
  const uint16_t half = static_cast<const uint16_t*>(data)[index];
  if (type == FloatType::bfloat16) return bits_to_float(static_cast<uint32_t>(half) << 16);
  return half_to_float(half);
}

inline void store_float(void* data, FloatType type, int64_t index, float value) {
  if (type == FloatType::float32) {
    static_cast<float*>(data)[index] = value;
  } else if (type == FloatType::bfloat16) {
    static_cast<uint16_t*>(data)[index] = float_to_bfloat16(value);
  } else {
    static_cast<uint16_t*>(data)[index] = float_to_half(value);
  }
}

inline int64_t float_bytes(FloatType type) { return type == FloatType::float32 ? 4 : 2; }

}  // namespace
}  // namespace narrowcast
