// AVX2 helpers shared by the *_avx2.cpp files: loads and stores of 8 floats of any element type.
#pragma once

#include <immintrin.h>

#include "float_types.h"

namespace narrowcast {
namespace {

template <FloatType type>
inline __m256 load8(const void* data, int64_t index) {
  if constexpr (type == FloatType::float32) {
    return _mm256_loadu_ps(static_cast<const float*>(data) + index);
  } else {
    const auto* halves = reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(data) + index);
    const __m128i half = _mm_loadu_si128(halves);
    if constexpr (type == FloatType::float16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

// The first `count` (< 8) values, zeros behind them.
template <FloatType type>
inline __m256 load8_tail(const void* data, int64_t index, int64_t count) {
  float values[8] = {};
  for (int64_t lane = 0; lane < count; ++lane) values[lane] = load_float(data, type, index + lane);
  return _mm256_loadu_ps(values);
}

inline void store8(void* data, FloatType type, int64_t index, int64_t count, __m256 value) {
  if (count >= 8 && type == FloatType::float32) {
    _mm256_storeu_ps(static_cast<float*>(data) + index, value);
    return;
  }
  if (count >= 8 && type == FloatType::float16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + index),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    return;
  }
  float values[8];
  _mm256_storeu_ps(values, value);
  for (int64_t lane = 0; lane < (count < 8 ? count : 8); ++lane) store_float(data, type, index + lane, values[lane]);
}

}  // namespace
}  // namespace narrowcast
