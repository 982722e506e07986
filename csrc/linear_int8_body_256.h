// int8 linear tile on 256 bits, for AVX2 and AVX-VNNI. Without vpdpbusd, codes and weights are widened to int16 and
// multiplied by vpmaddwd: exact for every code and weight, where vpmaddubsw saturates for 255 * 127 * 2.
//
// Few rows: 4 stored weight rows at a time along K. Many rows: 16 columns are copied once into a panel of 32-bit words,
// [depth / kWord][16][kWord], and a 6 x 16 register tile runs over all rows.
#pragma once

#include "linear.h"

#include <string.h>

#include "dot_256.h"
#include "fused.h"
#include "simd_avx2.h"
#include "transpose_avx2.h"

namespace narrowcast {
namespace {

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelRows = 6;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Lane i of the result is the sum of the 8 lanes of the i-th argument.
inline __m128i sum_lanes(__m256i a, __m256i b, __m256i c, __m256i d) {
  const __m256i quads = _mm256_hadd_epi32(_mm256_hadd_epi32(a, b), _mm256_hadd_epi32(c, d));
  return _mm_add_epi32(_mm256_castsi256_si128(quads), _mm256_extracti128_si256(quads, 1));
}

// A word is what one 32-bit lane multiplies: kWord inputs as PanelCode and PanelWeight.
#if NARROWCAST_DOT_256
constexpr int64_t kWord = 4;
using PanelCode = uint8_t;
using PanelWeight = int8_t;

inline __m256i load_codes(const uint8_t* codes) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)); }

inline __m256i load_weight(const int8_t* weight) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
}

inline __m256i multiply_add(__m256i sums, __m256i codes, __m256i weight) { return dot_bytes(sums, codes, weight); }
#else
constexpr int64_t kWord = 2;
using PanelCode = int16_t;
using PanelWeight = int16_t;

inline __m256i load_codes(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline __m256i load_weight(const int8_t* weight) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
}

inline __m256i multiply_add(__m256i sums, __m256i codes, __m256i weight) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(codes, weight));
}
#endif
constexpr int64_t kStep = 8 * kWord;  // inputs of one register

// Sums of one row with up to 64 columns from the stored rows.
void dot_row(const Int8Linear& problem, int64_t row, Range columns, int32_t* out) {
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  for (int64_t column = columns.begin; column < columns.end; column += 4) {
    const int8_t* weight[4];
    for (int c = 0; c < 4; ++c) weight[c] = problem.weight + smaller(column + c, columns.end - 1) * problem.depth;
    __m256i sums[4] = {};
    int64_t k = 0;
    for (; k + kStep <= problem.depth; k += kStep) {
      const __m256i a = load_codes(codes + k);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        sums[c] = multiply_add(sums[c], a, load_weight(weight[c] + k));
      }
    }
    int32_t lanes[4];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(lanes), sum_lanes(sums[0], sums[1], sums[2], sums[3]));
    for (int64_t c = 0; c < smaller(4, columns.end - column); ++c) {
      int32_t sum = lanes[c];
      for (int64_t tail = k; tail < problem.depth; ++tail) sum += static_cast<int32_t>(codes[tail]) * weight[c][tail];
      out[column - columns.begin + c] = sum;
    }
  }
}

// Copies up to 16 stored weight rows into the panel [ceil(depth / kWord)][16][kWord], zeros where there is no weight.
void pack_panel(const Int8Linear& problem, Range columns, PanelWeight* panel) {
  const int64_t depth = problem.depth, count = columns.end - columns.begin;
  const int8_t* weight = problem.weight + columns.begin * depth;
  int64_t k = 0;
  for (; k + kStep <= depth; k += kStep) {
    for (int64_t first = 0; first < kPanelColumns; first += 8) {
      __m256i tile[8];
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) {
        tile[c] = first + c < count ? load_weight(weight + (first + c) * depth + k) : _mm256_setzero_si256();
      }
      transpose_dwords8(tile);
      PanelWeight* target = panel + k * kPanelColumns + kWord * first;
#pragma GCC unroll 8
      for (int word = 0; word < 8; ++word) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(target + word * kWord * kPanelColumns), tile[word]);
      }
    }
  }
  for (; k < depth; k += kWord) {
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      PanelWeight* target = panel + k * kPanelColumns + kWord * c;
      for (int64_t i = 0; i < kWord; ++i) target[i] = c < count && k + i < depth ? weight[c * depth + k + i] : 0;
    }
  }
}

struct PanelRows {
  const PanelCode* codes;
  int64_t stride;
};

// The codes of `count` rows from `row` on as whole words; where the last word holds more than the row, its weights are
// zero.
PanelRows panel_codes(const Int8Linear& problem, int64_t row, int64_t count, [[maybe_unused]] PanelCode* scratch) {
#if NARROWCAST_DOT_256
  static_cast<void>(count);
  return {problem.codes + row * problem.code_stride, problem.code_stride};
#else
  const int64_t stride = (problem.depth + 1) / 2 * 2;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* codes = problem.codes + (row + r) * problem.code_stride;
    for (int64_t k = 0; k < problem.depth; ++k) scratch[r * stride + k] = codes[k];
    if (problem.depth % 2 != 0) scratch[r * stride + problem.depth] = 0;
  }
  return {scratch, stride};
#endif
}

template <int ROWS>
__attribute__((noinline)) void panel_rows(PanelRows rows, const PanelWeight* panel, int64_t words, int32_t* out) {
  const PanelCode* codes = rows.codes;
  __m256i sums[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t index = 0; index < words; ++index, panel += kWord * kPanelColumns, codes += kWord) {
    const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 8 * kWord));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t word;
      memcpy(&word, codes + r * rows.stride, 4);
      const __m256i a = _mm256_set1_epi32(word);
      sums[r][0] = multiply_add(sums[r][0], a, w0);
      sums[r][1] = multiply_add(sums[r][1], a, w1);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns), sums[r][0]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns + 8), sums[r][1]);
  }
}

// Turns `row_count` rows of sums, `stride` apart, into output values.
void finish(const Int8Linear& problem, int64_t first_row, int64_t row_count, Range columns, const int32_t* sums,
            int64_t stride) {
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t row = first_row + r;
    const __m256 row_scale = _mm256_set1_ps(problem.row_scale[row]);
    int64_t column = columns.begin;
    for (; column + 8 <= columns.end; column += 8) {
      const auto* source = reinterpret_cast<const __m256i*>(sums + r * stride + (column - columns.begin));
      const auto* offset = reinterpret_cast<const __m256i*>(problem.offset + column);
      const __m256i correction =
          _mm256_mullo_epi32(_mm256_loadu_si256(offset), _mm256_set1_epi32(problem.row_offset[row]));
      const __m256 product = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_loadu_si256(source), correction));
      __m256 value = _mm256_mul_ps(product, _mm256_mul_ps(row_scale, _mm256_loadu_ps(problem.scale + column)));
      if (problem.bias != nullptr) value = _mm256_add_ps(value, _mm256_loadu_ps(problem.bias + column));
      value = (__m256)fuse<Float8, Int8>(problem.fused, (Float8)value);
      store8(problem.out, problem.out_type, row * problem.out_stride + column, 8, value);
    }
    for (; column < columns.end; ++column) {
      const int32_t sum = sums[r * stride + (column - columns.begin)] - problem.row_offset[row] * problem.offset[column];
      float value = static_cast<float>(sum) * (problem.row_scale[row] * problem.scale[column]);
      if (problem.bias != nullptr) value += problem.bias[column];
      value = fuse<float, int32_t>(problem.fused, value);
      store_float(problem.out, problem.out_type, row * problem.out_stride + column, value);
    }
  }
}

using PanelKernel = void (*)(PanelRows, const PanelWeight*, int64_t, int32_t*);
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1>, panel_rows<2>, panel_rows<3>,
                                                   panel_rows<4>, panel_rows<5>, panel_rows<6>};

inline int64_t word_count(int64_t depth) { return (depth + kWord - 1) / kWord; }

void many_rows(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  alignas(32) int32_t sums[kPanelRows * kPanelColumns];
  const int64_t words = word_count(problem.depth), tiles = (columns.end - columns.begin + 15) / 16;
  auto* panels = static_cast<PanelWeight*>(scratch);
  auto* wide = reinterpret_cast<PanelCode*>(panels + tiles * words * kWord * kPanelColumns);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column = columns.begin + tile * kPanelColumns;
    pack_panel(problem, {column, smaller(column + kPanelColumns, columns.end)},
               panels + tile * words * kWord * kPanelColumns);
  }
  for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
    const int64_t count = smaller(kPanelRows, rows.end - row);
    const PanelRows codes = panel_codes(problem, row, count, wide);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = columns.begin + tile * kPanelColumns;
      kPanelKernels[count - 1](codes, panels + tile * words * kWord * kPanelColumns, words, sums);
      finish(problem, row, count, {column, smaller(column + kPanelColumns, columns.end)}, sums, kPanelColumns);
    }
  }
}

inline void int8_tile(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  const bool panel = rows.end - rows.begin >= 8;
  for (int64_t column = columns.begin; column < columns.end; column += kColumnTile) {
    const Range part = {column, smaller(column + kColumnTile, columns.end)};
    if (panel) {
      many_rows(problem, rows, part, scratch);
      continue;
    }
    int32_t sums[kColumnTile];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      dot_row(problem, row, part, sums);
      finish(problem, row, 1, part, sums, kColumnTile);
    }
  }
}

// Panels of 64 columns and the codes of 6 rows.
inline int64_t int8_scratch(int64_t depth) { return word_count(depth) * 4 * (kColumnTile + kPanelRows); }

}  // namespace
}  // namespace narrowcast
