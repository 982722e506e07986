// int8 linear tile, AVX2. vpmaddubsw saturates for 255 * 127 * 2, so the codes are widened to int16 and multiplied by
// vpmaddwd, which is exact for every code and weight.
//
// Few rows: 4 stored weight rows at a time along K. Many rows: 16 columns are copied once into a [depth / 2][16][2]
// int16 panel, and a 6 x 16 register tile runs over all rows.
#include "linear.h"

#include <string.h>

#include "fused.h"
#include "simd_avx2.h"

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

inline __m256i widen_codes(const uint8_t* codes) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
}

inline __m256i widen_weight(const int8_t* weight) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight)));
}

// Sums of one row with up to 64 columns from the stored rows.
void dot_row(const Int8Linear& problem, int64_t row, Range columns, int32_t* out) {
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  for (int64_t column = columns.begin; column < columns.end; column += 4) {
    const int8_t* weight[4];
    for (int c = 0; c < 4; ++c) weight[c] = problem.weight + smaller(column + c, columns.end - 1) * problem.depth;
    __m256i sums[4] = {};
    int64_t k = 0;
    for (; k + 16 <= problem.depth; k += 16) {
      const __m256i a = widen_codes(codes + k);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(a, widen_weight(weight[c] + k)));
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

// 8 rows of 8 dwords to 8 columns of 8 dwords, in place.
inline void transpose8(__m256i* a) {
  __m256i b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    a[4 * i] = _mm256_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm256_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm256_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm256_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    b[j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x20);
    b[4 + j] = _mm256_permute2x128_si256(a[j], a[4 + j], 0x31);
  }
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = b[i];
}

// Copies up to 16 stored weight rows into the panel [ceil(depth / 2)][16][2] int16, zeros where there is no weight.
void pack_panel(const Int8Linear& problem, Range columns, int16_t* panel) {
  const int64_t depth = problem.depth, count = columns.end - columns.begin;
  const int8_t* weight = problem.weight + columns.begin * depth;
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    for (int64_t first = 0; first < kPanelColumns; first += 8) {
      __m256i tile[8];
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) {
        tile[c] = first + c < count ? widen_weight(weight + (first + c) * depth + k) : _mm256_setzero_si256();
      }
      transpose8(tile);
      int16_t* target = panel + k * kPanelColumns + 2 * first;
#pragma GCC unroll 8
      for (int pair = 0; pair < 8; ++pair) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(target + pair * 2 * kPanelColumns), tile[pair]);
      }
    }
  }
  for (; k < depth; k += 2) {
    for (int64_t c = 0; c < kPanelColumns; ++c) {
      int16_t* target = panel + k * kPanelColumns + 2 * c;
      target[0] = c < count ? weight[c * depth + k] : 0;
      target[1] = c < count && k + 1 < depth ? weight[c * depth + k + 1] : 0;
    }
  }
}

// Widens the codes of one row to int16; a zero follows an odd depth.
void widen_row(const uint8_t* codes, int64_t depth, int16_t* wide) {
  for (int64_t k = 0; k < depth; ++k) wide[k] = codes[k];
  if (depth % 2 != 0) wide[depth] = 0;
}

template <int ROWS>
__attribute__((noinline)) void panel_rows(const int16_t* codes, int64_t stride, const int16_t* panel, int64_t pairs,
                                          int32_t* out) {
  __m256i sums[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t pair = 0; pair < pairs; ++pair, panel += 2 * kPanelColumns, codes += 2) {
    const __m256i w0 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i w1 = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 16));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t two;
      memcpy(&two, codes + r * stride, 4);
      const __m256i a = _mm256_set1_epi32(two);
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(a, w0));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(a, w1));
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

using PanelKernel = void (*)(const int16_t*, int64_t, const int16_t*, int64_t, int32_t*);
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1>, panel_rows<2>, panel_rows<3>,
                                                   panel_rows<4>, panel_rows<5>, panel_rows<6>};

void many_rows(const Int8Linear& problem, Range rows, Range columns, int16_t* scratch) {
  alignas(32) int32_t sums[kPanelRows * kPanelColumns];
  const int64_t pairs = (problem.depth + 1) / 2, tiles = (columns.end - columns.begin + 15) / 16;
  int16_t* panels = scratch;
  int16_t* wide = scratch + tiles * pairs * 2 * kPanelColumns;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column = columns.begin + tile * kPanelColumns;
    pack_panel(problem, {column, smaller(column + kPanelColumns, columns.end)},
               panels + tile * pairs * 2 * kPanelColumns);
  }
  for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
    const int64_t count = smaller(kPanelRows, rows.end - row);
    for (int64_t r = 0; r < count; ++r) {
      widen_row(problem.codes + (row + r) * problem.code_stride, problem.depth, wide + r * 2 * pairs);
    }
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = columns.begin + tile * kPanelColumns;
      kPanelKernels[count - 1](wide, 2 * pairs, panels + tile * pairs * 2 * kPanelColumns, pairs, sums);
      finish(problem, row, count, {column, smaller(column + kPanelColumns, columns.end)}, sums, kPanelColumns);
    }
  }
}

}  // namespace

void int8_tile_avx2(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  const bool panel = rows.end - rows.begin >= 8;
  for (int64_t column = columns.begin; column < columns.end; column += kColumnTile) {
    const Range part = {column, smaller(column + kColumnTile, columns.end)};
    if (panel) {
      many_rows(problem, rows, part, static_cast<int16_t*>(scratch));
      continue;
    }
    int32_t sums[kColumnTile];
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      dot_row(problem, row, part, sums);
      finish(problem, row, 1, part, sums, kColumnTile);
    }
  }
}

// Panels of 64 columns and the widened codes of 6 rows.
int64_t int8_scratch_avx2(int64_t depth) { return (depth + 1) / 2 * 4 * (kColumnTile + kPanelRows); }

}  // namespace narrowcast
