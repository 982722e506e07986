// What the AVX-512 bodies of the int8 linear share: the way from raw int32 sums to output values.
#pragma once

#include "linear.h"

#include "fused.h"
#include "simd_avx512.h"

namespace narrowcast {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

constexpr int64_t kPanelColumns = 64;
constexpr int64_t kPanelRows = 6;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Turns sums[row][kPanelColumns] of `row_count` rows into output values.
inline void finish(const Int8Linear& problem, int64_t first_row, int64_t row_count, Range columns,
                   const int32_t* sums) {
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const __mmask16 mask = lanes16(columns.end - column);
    const __m512i offset = _mm512_maskz_loadu_epi32(mask, problem.offset + column);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, problem.scale + column);
    const __m512 bias =
        problem.bias != nullptr ? _mm512_maskz_loadu_ps(mask, problem.bias + column) : _mm512_setzero_ps();
    const int32_t* source = sums + (column - columns.begin);
    for (int64_t r = 0; r < row_count; ++r, source += kPanelColumns) {
      const __m512i correction = _mm512_mullo_epi32(offset, _mm512_set1_epi32(problem.row_offset[first_row + r]));
      const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_loadu_si512(source), correction));
      __m512 value = _mm512_mul_ps(product, _mm512_mul_ps(_mm512_set1_ps(problem.row_scale[first_row + r]), scale));
      if (problem.bias != nullptr) value = _mm512_add_ps(value, bias);
      value = (__m512)fuse<Float16, Int16>(problem.fused, (Float16)value);
      store16(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, mask, value);
    }
  }
}

}  // namespace
}  // namespace narrowcast
