// NEON helpers shared by the files of the Arm tiers: loads and stores of 4 floats of any element type.
#pragma once

#include <arm_neon.h>

#include "float_types.h"

namespace narrowcast {
namespace {

template <FloatType type>
inline float32x4_t load4(const void* data, int64_t index) {
  if constexpr (type == FloatType::float32) {
    return vld1q_f32(static_cast<const float*>(data) + index);
  } else {
    const uint16x4_t half = vld1_u16(static_cast<const uint16_t*>(data) + index);
    if constexpr (type == FloatType::float16) return vcvt_f32_f16(vreinterpret_f16_u16(half));
    return vreinterpretq_f32_u32(vshll_n_u16(half, 16));
  }
}

// The first `count` (at most 4) values, zeros behind them.
template <FloatType type>
inline float32x4_t load4_tail(const void* data, int64_t index, int64_t count) {
  if (count >= 4) return load4<type>(data, index);
  float values[4] = {};
  for (int64_t lane = 0; lane < count; ++lane) values[lane] = load_float(data, type, index + lane);
  return vld1q_f32(values);
}

inline void store4(void* data, FloatType type, int64_t index, int64_t count, float32x4_t value) {
  if (count >= 4 && type == FloatType::float32) {
    vst1q_f32(static_cast<float*>(data) + index, value);
    return;
  }
  float values[4];
  vst1q_f32(values, value);
  for (int64_t lane = 0; lane < (count < 4 ? count : 4); ++lane) store_float(data, type, index + lane, values[lane]);
}

}  // namespace
}  // namespace narrowcast
