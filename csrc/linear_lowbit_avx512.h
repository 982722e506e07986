// What the two AVX-512 bodies of the low-bit linear share: scales and zero points of 16 columns side by side, levels of
// packed fields, and the end of a tile.
#pragma once

#include "linear_lowbit.h"

#include "fused.h"
#include "simd_avx512.h"
#include "transpose_avx512.h"
#include "unpack_avx512.h"

namespace narrowcast {

// One or two rows straight from the stored weights.
void lowbit_few_rows_avx512vnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
int64_t lowbit_few_rows_scratch_avx512vnni(const LowBitLinear& problem);

// See InterleavedKernels.
bool lowbit_codes_avx512vnni(const LowBitLinear& problem, const void* x, FloatType type, int64_t input_group,
                             uint8_t* codes, float* scales, int32_t* sums);

namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

constexpr int64_t kPanelColumns = 32;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales [groups][WIDTH] and zero points, the byte four times in each int32, [groups][WIDTH], of WIDTH columns.
struct Groups {
  float* scales;
  int32_t* zero_points;
};

// Scales of 16 columns; lane c of the result's row g is group `group + g` of column c.
inline void load_scales(const LowBitLinear& problem, int64_t column, int64_t count, int64_t group, __m512i* tile) {
  const __mmask16 mask = lanes16(problem.groups - group);
  const __m512 factor = _mm512_set1_ps(problem.level_scale);
  const int64_t scale_bytes = problem.scale_is_half ? 2 : 4;
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
    const __m512 scale = problem.scale_is_half ? load16<FloatType::float16>(problem.scale, index, mask)
                                               : load16<FloatType::float32>(problem.scale, index, mask);
    tile[c] = _mm512_castps_si512(_mm512_mul_ps(scale, factor));
    _mm_prefetch(static_cast<const char*>(problem.scale) + (index + 16 * problem.groups) * scale_bytes, _MM_HINT_T1);
  }
}

// Zero points of 16 columns, 64 groups by one transposition: the byte of group `group + g` four times in each lane.
template <int WIDTH>
void expand_zero_points(const LowBitLinear& problem, int64_t column, int64_t count, int64_t group, int32_t* target) {
  const __m512i field_mask = _mm512_set1_epi8(static_cast<char>((1 << problem.bits) - 1));
  const __mmask64 mask = lanes64(problem.groups - group);
  __m512i tile[16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
    tile[c] = _mm512_and_si512(_mm512_maskz_loadu_epi8(mask, problem.zero_point + index), field_mask);
    _mm_prefetch(problem.zero_point + index + 16 * problem.groups, _MM_HINT_T1);
  }
  transpose16(tile);
  const int64_t steps = smaller(64, problem.groups - group);
  const __m512i first = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
#pragma GCC unroll 16
  for (int four = 0; four < 16; ++four) {
    for (int byte = 0; byte < 4 && 4 * four + byte < steps; ++byte) {
      const __m512i order = _mm512_add_epi8(first, _mm512_set1_epi8(static_cast<char>(byte)));
      _mm512_store_si512(target + (group + 4 * four + byte) * WIDTH, _mm512_shuffle_epi8(tile[four], order));
    }
  }
}

// Scales and zero points of up to 16 columns, of which each takes one of WIDTH places.
template <int WIDTH>
void expand_groups(const LowBitLinear& problem, int64_t column, int64_t count, Groups groups) {
  __m512i tile[16];
  for (int64_t group = 0; group < problem.groups; group += 16) {
    const int64_t steps = smaller(16, problem.groups - group);
    load_scales(problem, column, count, group, tile);
    transpose16(tile);
    for (int64_t g = 0; g < steps; ++g) _mm512_store_si512(groups.scales + (group + g) * WIDTH, tile[g]);
  }
  if (problem.zero_point == nullptr) return;
  for (int64_t group = 0; group < problem.groups; group += 64) {
    expand_zero_points<WIDTH>(problem, column, count, group, groups.zero_points);
  }
}

// Levels 0..255 of 64 fields.
template <int BITS, bool LEVELS>
inline __m512i levels64(__m512i packed, __m512i table) {
  const __m512i fields = spread64<BITS>(packed);
  if constexpr (BITS == 8) return _mm512_xor_si512(fields, _mm512_set1_epi8(-128));
  if constexpr (LEVELS) return _mm512_shuffle_epi8(table, fields);
  return fields;
}

inline __m512i level_table(const LowBitLinear& problem) {
  if (problem.levels == nullptr) return _mm512_setzero_si512();
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(problem.levels)));
}

// Bias, activation function and conversion of totals[row][STRIDE].
template <int64_t STRIDE>
inline void finish(const LowBitLinear& problem, int64_t first_row, int64_t row_count, Range columns,
                   const float* totals) {
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const __mmask16 mask = lanes16(columns.end - column);
    const __m512 bias =
        problem.bias != nullptr ? _mm512_maskz_loadu_ps(mask, problem.bias + column) : _mm512_setzero_ps();
    for (int64_t r = 0; r < row_count; ++r) {
      __m512 value = _mm512_load_ps(totals + r * STRIDE + (column - columns.begin));
      if (problem.bias != nullptr) value = _mm512_add_ps(value, bias);
      value = (__m512)fuse<Float16, Int16>(problem.fused, (Float16)value);
      store16(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, mask, value);
    }
  }
}

}  // namespace
}  // namespace narrowcast
