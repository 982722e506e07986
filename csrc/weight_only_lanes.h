// Lanes of 32 bits and the scales that belong to them; shared by the AVX-512 kernels for a few input rows.
#pragma once

#include <immintrin.h>

#include "weight_only.h"

namespace narrowcast {
namespace {

constexpr int fields_of(int bits) { return bits == 4 ? 8 : bits == 2 ? 16 : 4; }

inline bool covers_lanes(const StoredWeight& weight) {
  const int64_t fields = fields_of(weight.bits), lanes = weight.group / fields;
  if (weight.columns < 16 * fields) return false;
  if (weight.group >= weight.columns) return true;
  return weight.group % fields == 0 && (lanes % 16 == 0 || 16 % lanes == 0);
}

// The scales or zero points of the lanes of a block.
struct LaneScales {
  __m512i spread;       // lane -> which of the block's scales
  __mmask16 mask;       // how many scales a block has
  int64_t per_block;    // the same number; 0 where a scale covers one block or more
  int64_t per_scale;    // then: blocks that a scale covers

  LaneScales(const StoredWeight& weight, int64_t block, int64_t fields) {
    const int64_t lanes = weight.group / fields;
    per_block = weight.group < block ? 16 / lanes : 0;
    per_scale = weight.group >= weight.columns ? INT64_MAX : per_block != 0 ? 1 : weight.group / block;
    mask = static_cast<__mmask16>((1u << per_block) - 1);
    alignas(64) int32_t index[16];
    for (int lane = 0; lane < 16; ++lane) index[lane] = per_block != 0 ? lane / static_cast<int>(lanes) : 0;
    spread = _mm512_load_si512(index);
  }

  __m512 scales(const StoredWeight& weight, int64_t first, int64_t block) const {
    if (per_block == 0) {
      const int64_t at = first + (per_scale == INT64_MAX ? 0 : block / per_scale);
      return _mm512_set1_ps(load_scale(weight.scale, weight.scale_type, at));
    }
    const int64_t at = first + block * per_block;
    __m512 values;
    if (weight.scale_type == ScaleType::float16) {
      values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(weight.scale) + at));
    } else if (weight.scale_type == ScaleType::float32) {
      values = _mm512_maskz_loadu_ps(mask, static_cast<const float*>(weight.scale) + at);
    } else {
      const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(weight.scale) + at);
      const __m512i exponents = _mm512_cvtepu8_epi32(bytes);
      const __mmask16 lowest = _mm512_cmpeq_epi32_mask(exponents, _mm512_setzero_si512());
      const __m512i bits = _mm512_mask_mov_epi32(_mm512_slli_epi32(exponents, 23), lowest, _mm512_set1_epi32(0x400000));
      values = _mm512_castsi512_ps(bits);
    }
    return _mm512_permutexvar_ps(spread, values);
  }

  // Zero points less the middle of the codes.
  __m512 zeros(const StoredWeight& weight, int64_t first, int64_t block) const {
    const int middle = 1 << (weight.bits - 1);
    if (per_block == 0) {
      const int64_t at = first + (per_scale == INT64_MAX ? 0 : block / per_scale);
      return _mm512_set1_ps(load_zero(weight, at) - static_cast<float>(middle));
    }
    const int64_t at = first + block * per_block;
    if (weight.zero_is_half) {
      const auto* halves = static_cast<const uint16_t*>(weight.zero_point) + at;
      const __m512 values = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves));
      return _mm512_permutexvar_ps(spread, _mm512_sub_ps(values, _mm512_set1_ps(static_cast<float>(middle))));
    }
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(weight.zero_point) + at);
    const __m512i centred = _mm512_sub_epi32(_mm512_cvtepu8_epi32(bytes), _mm512_set1_epi32(middle));
    return _mm512_permutexvar_ps(spread, _mm512_cvtepi32_ps(centred));
  }
};

// The columns behind the last whole block, expanded one row at a time.
inline void add_rest(const StoredWeight& weight, int64_t column, int64_t begin, const float* x, int64_t stride,
                     int64_t rows, float* sums) {
  float values[256];
  expand_avx512vnni.expand(weight, column, begin, weight.columns - begin, values);
  for (int64_t row = 0; row < rows; ++row) {
    float sum = 0.0f;
    for (int64_t at = 0; at < weight.columns - begin; ++at) sum += values[at] * x[row * stride + at];
    sums[row] += sum;
  }
}

}  // namespace
}  // namespace narrowcast
