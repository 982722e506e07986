// int4 linear tile on 256 bits, for AVX2 and AVX-VNNI: nibbles are the unsigned operand of the byte products. Four
// columns are unpacked once to bytes; then two blocks of 32 at a time for every row.
#pragma once

#include "linear.h"

#include <string.h>

#include "dot_256.h"
#include "simd_avx2.h"

namespace narrowcast {
namespace {

constexpr int64_t kColumns = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What the rows share: four columns' nibbles [pairs][4][even, odd][32], scales and zero points [pairs][2][4].
struct Columns {
  uint8_t* nibbles;
  float* scales;
  int32_t* zero_points;
  int64_t blocks;
};

void expand_groups(const Int4Linear& problem, int64_t column, int64_t count, const Columns& columns) {
  for (int64_t block = 0; block < (columns.blocks + 1) / 2 * 2; ++block) {
    const int64_t group = smaller(block / problem.blocks_per_group, problem.groups - 1);
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
      const __m128i half = _mm_cvtsi32_si128(problem.scale[index]);
      columns.scales[block * kColumns + c] = _mm_cvtss_f32(_mm_cvtph_ps(half));
      columns.zero_points[block * kColumns + c] = problem.zero_point != nullptr ? problem.zero_point[index] : 8;
    }
  }
}

inline __m256i two_blocks(const uint8_t* weight, int64_t bytes) {
  if (bytes >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
  alignas(32) uint8_t padded[32] = {};
  memcpy(padded, weight, static_cast<size_t>(bytes));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(padded));
}

void unpack(const Int4Linear& problem, int64_t column, int64_t count, const Columns& columns) {
  const int64_t row_bytes = (problem.depth + 1) / 2;
  const __m256i mask = _mm256_set1_epi8(15);
  auto* target = reinterpret_cast<__m256i*>(columns.nibbles);
  for (int64_t block = 0; block < columns.blocks; block += 2) {
    for (int64_t c = 0; c < kColumns; ++c) {
      const uint8_t* weight = problem.weight + (column + smaller(c, count - 1)) * row_bytes;
      const __m256i bytes = two_blocks(weight + 16 * block, row_bytes - 16 * block);
      _mm256_store_si256(target++, _mm256_and_si256(bytes, mask));
      _mm256_store_si256(target++, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask));
    }
  }
}

// One value per 128-bit lane from two neighbours in memory.
inline __m256i spread(const int32_t* values) {
  return _mm256_set_m128i(_mm_set1_epi32(values[1]), _mm_set1_epi32(values[0]));
}

// Sums of two blocks with four columns, whose even and odd nibbles alternate: lane c of either half is column c.
inline __m256i dot_columns(const __m256i* nibbles, __m256i evens, __m256i odds) {
  __m256i sums[kColumns];
#if NARROWCAST_DOT_256
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    const __m256i even = dot_bytes(_mm256_setzero_si256(), _mm256_load_si256(nibbles + 2 * c), evens);
    sums[c] = dot_bytes(even, _mm256_load_si256(nibbles + 2 * c + 1), odds);
  }
  return _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
#else
  // Eight sums of 15 * 127 * 2 fit in int16: vpmaddubsw does not saturate.
#pragma GCC unroll 4
  for (int c = 0; c < kColumns; ++c) {
    sums[c] = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_load_si256(nibbles + 2 * c), evens),
                               _mm256_maddubs_epi16(_mm256_load_si256(nibbles + 2 * c + 1), odds));
  }
  const __m256i halves = _mm256_hadd_epi16(_mm256_hadd_epi16(sums[0], sums[1]), _mm256_hadd_epi16(sums[2], sums[3]));
  return _mm256_madd_epi16(halves, _mm256_set1_epi16(1));
#endif
}

__m128 dot_row(const Int4Linear& problem, int64_t row, const Columns& columns) {
  const int8_t* codes = problem.codes + row * problem.code_stride;
  const float* code_scales = problem.code_scales + row * problem.block_stride;
  const int32_t* code_sums = problem.code_sums + row * problem.block_stride;
  __m128 total = _mm_setzero_ps();
  for (int64_t block = 0; block < columns.blocks; block += 2, codes += 64) {
    const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 32));
    const __m256i evens = _mm256_permute2x128_si256(first, second, 0x20);
    const __m256i odds = _mm256_permute2x128_si256(first, second, 0x31);
    const __m256i sum = dot_columns(reinterpret_cast<const __m256i*>(columns.nibbles) + block * kColumns, evens, odds);
    // A zero point and a sum of 32 codes fit in 16 bits: vpmaddwd multiplies the low halves exactly.
    const __m256i zero_point =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(columns.zero_points + block * kColumns));
    const __m256i correction = _mm256_madd_epi16(zero_point, spread(code_sums + block));
    const __m256 code_scale =
        _mm256_set_m128(_mm_set1_ps(code_scales[block + 1]), _mm_set1_ps(code_scales[block]));
    const __m256 step = _mm256_mul_ps(code_scale, _mm256_loadu_ps(columns.scales + block * kColumns));
    const __m256 term = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(sum, correction)), step);
    total = _mm_add_ps(total, _mm256_castps256_ps128(term));
    if (block + 1 < columns.blocks) total = _mm_add_ps(total, _mm256_extractf128_ps(term, 1));
  }
  return total;
}

void int4_tile(const Int4Linear& problem, Range rows, Range range, void* scratch) {
  const int64_t blocks = (problem.depth + 31) / 32, padded = (blocks + 1) / 2 * 2;
  auto* nibbles = static_cast<uint8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(nibbles + padded * 32 * kColumns);
  const Columns columns = {nibbles, scales, reinterpret_cast<int32_t*>(scales + padded * kColumns), blocks};
  for (int64_t column = range.begin; column < range.end; column += kColumns) {
    const int64_t count = smaller(kColumns, range.end - column);
    expand_groups(problem, column, count, columns);
    unpack(problem, column, count, columns);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float totals[kColumns];
      _mm_storeu_ps(totals, dot_row(problem, row, columns));
      for (int64_t c = 0; c < count; ++c) {
        const float value = problem.bias != nullptr ? totals[c] + problem.bias[column + c] : totals[c];
        store_float(problem.out, problem.out_type, row * problem.out_stride + column + c, value);
      }
    }
  }
}

int64_t int4_scratch(int64_t depth) { return ((depth + 31) / 32 + 1) * (32 + 2 * 4) * kColumns; }

}  // namespace
}  // namespace narrowcast
