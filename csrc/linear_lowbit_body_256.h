// Low-bit linear tile on 256 bits, for AVX2 and AVX-VNNI. 16 columns are expanded once into a panel of signed bytes with the
// zero points subtracted. With vpdpbusd, that is all; without it:
//
// vpmaddubsw multiplies unsigned by signed bytes and saturates at 32767. With weights of magnitude w the codes 0..255 are its
// unsigned operand while 2 * 255 * w * RUN fits, where RUN products are summed in int16 before they are widened: 8 bits
// leave room for w = 64 / RUN. Larger weights (int8, nf4) give their sign to the activation: |w| * (sign(w) a), and
// 2 * 128 * 127 fits too. Every product is exact.
#pragma once

#include "linear_lowbit.h"

#include "dot_256.h"
#include "fused.h"
#include "simd_avx2.h"
#include "transpose_avx2.h"
#include "unpack_avx2.h"

namespace narrowcast {
namespace {

typedef float Float8 __attribute__((vector_size(32)));
typedef int32_t Int8 __attribute__((vector_size(32)));

constexpr int64_t kPanelColumns = 16;
#if NARROWCAST_DOT_256
constexpr int64_t kPanelRows = 6;
#else
constexpr int64_t kPanelRows = 3;
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline __m256i* vector_at(void* address) { return static_cast<__m256i*>(address); }
inline const __m256i* vector_at(const void* address) { return static_cast<const __m256i*>(address); }

// What the rows of a panel share: scales [groups][16], zero points [groups][16] (the byte four times in each int32),
// starting sums [blocks][16], weights [blocks * block / 4][16][4].
struct Panel {
  float* scales;
  int32_t* zero_points;
  int32_t* starts;
  int8_t* weights;
};

inline __m256 load_scales(const LowBitLinear& problem, int64_t index, int64_t count) {
  const __m256 factor = _mm256_set1_ps(problem.level_scale);
  if (problem.scale_is_half) {
    return _mm256_mul_ps(count >= 8 ? load8<FloatType::float16>(problem.scale, index)
                                    : load8_tail<FloatType::float16>(problem.scale, index, count), factor);
  }
  return _mm256_mul_ps(count >= 8 ? load8<FloatType::float32>(problem.scale, index)
                                  : load8_tail<FloatType::float32>(problem.scale, index, count), factor);
}

inline __m256i load_zero_points(const LowBitLinear& problem, int64_t index, int64_t count) {
  const uint8_t* source = problem.zero_point + index;
  uint8_t bytes[8] = {};
  if (count < 8) {
    memcpy(bytes, source, static_cast<size_t>(count));
    source = bytes;
  }
  const __m256i values = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
  const __m256i low_bits = _mm256_and_si256(values, _mm256_set1_epi32((1 << problem.bits) - 1));
  return _mm256_mullo_epi32(low_bits, _mm256_set1_epi32(0x01010101));
}

// Scales and zero points of 8 columns.
void expand_groups(const LowBitLinear& problem, int64_t column, int64_t count, Panel panel) {
  __m256i scales[8], zero_points[8];
  for (int64_t group = 0; group < problem.groups; group += 8) {
    const int64_t steps = smaller(8, problem.groups - group);
    for (int c = 0; c < 8; ++c) {
      const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
      scales[c] = _mm256_castps_si256(load_scales(problem, index, steps));
      if (problem.zero_point != nullptr) zero_points[c] = load_zero_points(problem, index, steps);
    }
    transpose_dwords8(scales);
    if (problem.zero_point != nullptr) transpose_dwords8(zero_points);
    for (int64_t g = 0; g < steps; ++g) {
      _mm256_store_si256(vector_at(panel.scales + (group + g) * kPanelColumns), scales[g]);
      if (problem.zero_point == nullptr) continue;
      _mm256_store_si256(vector_at(panel.zero_points + (group + g) * kPanelColumns), zero_points[g]);
    }
  }
}

// Levels 0..255 of 32 fields.
template <int BITS, bool LEVELS>
inline __m256i levels32(__m256i fields, __m256i table) {
  if constexpr (BITS == 8) return _mm256_xor_si256(fields, _mm256_set1_epi8(-128));
  if constexpr (LEVELS) return _mm256_shuffle_epi8(table, fields);
  return fields;
}

// Expands up to 8 stored weight rows to 8 columns of the panel.
template <int BITS, bool LEVELS>
__attribute__((noinline)) void expand_weights(const LowBitLinear& problem, int64_t column, int64_t count, Panel panel) {
  const __m256i table =
      LEVELS ? _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(problem.levels)))
             : _mm256_setzero_si256();
  const int64_t depth = problem.blocks * problem.block;
  const __m256i constant = _mm256_set1_epi8(static_cast<char>(problem.zero));
  BlockCursor cursor = {problem.block, problem.blocks_per_group};
  for (int64_t k = 0; k < depth; k += 32) {
    __m256i tile[8];
#pragma GCC unroll 8
    for (int c = 0; c < 8; ++c) {
      const uint8_t* row = problem.weight + (column + smaller(c, count - 1)) * problem.row_bytes;
      if (k / 8 * BITS % 64 < 4 * BITS) _mm_prefetch(row + 16 * problem.row_bytes + k / 8 * BITS, _MM_HINT_T1);
      tile[c] = levels32<BITS, LEVELS>(unpack32<BITS>(row, problem.row_bytes, k), table);
    }
    transpose_dwords8(tile);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {  // 16 codes each: never in two blocks
      if (k + 16 * part >= depth) break;
      const __m256i zero_point = problem.zero_point != nullptr
                                     ? _mm256_load_si256(vector_at(panel.zero_points + cursor.group * kPanelColumns))
                                     : constant;
      int8_t* target = panel.weights + (k + 16 * part) * kPanelColumns;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        _mm256_store_si256(vector_at(target + quad * 4 * kPanelColumns),
                           _mm256_sub_epi8(tile[4 * part + quad], zero_point));
      }
      cursor.next_codes(16);
    }
  }
}

// The sums over each block start at -128 times the sum of its weights (16 columns).
void start_sums(const LowBitLinear& problem, Panel panel) {
  const __m256i ones = _mm256_set1_epi8(1), wide_ones = _mm256_set1_epi16(1);
  const int8_t* weights = panel.weights;
  for (int64_t block = 0; block < problem.blocks; ++block) {
    __m256i sums[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int64_t k = 0; k < problem.block; k += 16, weights += 16 * kPanelColumns) {
      for (int c = 0; c < 2; ++c) {
        __m256i pairs = _mm256_setzero_si256();  // eight weights below 128 fit in int16
        for (int quad = 0; quad < 4; ++quad) {
          const __m256i values = _mm256_load_si256(vector_at(weights + quad * 64 + 32 * c));
          pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(ones, values));
        }
        sums[c] = _mm256_add_epi32(sums[c], _mm256_madd_epi16(pairs, wide_ones));
      }
    }
    for (int c = 0; c < 2; ++c) {
      const __m256i start = _mm256_slli_epi32(_mm256_sub_epi32(_mm256_setzero_si256(), sums[c]), 7);
      _mm256_store_si256(vector_at(panel.starts + block * kPanelColumns + 8 * c), start);
    }
  }
}

using Expand = void (*)(const LowBitLinear&, int64_t, int64_t, Panel);

Expand expand_body(const LowBitLinear& problem) {
  switch (problem.bits) {
    case 2: return expand_weights<2, false>;
    case 3: return expand_weights<3, false>;
    case 4: return problem.levels != nullptr ? expand_weights<4, true> : expand_weights<4, false>;
    case 5: return expand_weights<5, false>;
    case 6: return expand_weights<6, false>;
    default: return expand_weights<8, false>;
  }
}

inline __m256i broadcast_four(const uint8_t* codes) {
  int32_t four;
  memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

#if NARROWCAST_DOT_256
// Sums of one block of `quads` quads of codes with 16 columns.
template <int ROWS, int RUN>
inline void block_sums(const uint8_t* codes, int64_t stride, const int8_t* weights, int64_t quads, __m256i (*sums)[2]) {
  for (int64_t quad = 0; quad < quads; ++quad, codes += 4, weights += 4 * kPanelColumns) {
    const __m256i w0 = _mm256_load_si256(vector_at(weights)), w1 = _mm256_load_si256(vector_at(weights + 32));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m256i a = broadcast_four(codes + r * stride);
      sums[r][0] = dot_bytes(sums[r][0], a, w0);
      sums[r][1] = dot_bytes(sums[r][1], a, w1);
    }
  }
}
#else
// Keeps GCC from turning a chain of additions into a tree, whose leaves it then spills: there are only 16 registers.
inline void in_register(__m256i* value) { asm("" : "+x"(*value)); }

// Sums of one block of `quads` quads of codes with 16 columns. RUN products are summed in int16; 0 gives the signs of
// the weights to the activations, which then are signed (128 taken off) and need no starting sum.
template <int ROWS, int RUN>
inline void block_sums(const uint8_t* codes, int64_t stride, const int8_t* weights, int64_t quads, __m256i (*sums)[2]) {
  constexpr int kStep = RUN > 0 ? RUN : 1;
  const __m256i ones = _mm256_set1_epi16(1);
  for (int64_t quad = 0; quad < quads; quad += kStep, codes += 4 * kStep, weights += kStep * 4 * kPanelColumns) {
    __m256i pairs[ROWS][2];
#pragma GCC unroll 8
    for (int step = 0; step < kStep; ++step) {
      const __m256i w0 = _mm256_load_si256(vector_at(weights + step * 64));
      const __m256i w1 = _mm256_load_si256(vector_at(weights + step * 64 + 32));
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        __m256i a = broadcast_four(codes + r * stride + 4 * step);
        __m256i p0, p1;
        if constexpr (RUN > 0) {
          p0 = _mm256_maddubs_epi16(a, w0), p1 = _mm256_maddubs_epi16(a, w1);
        } else {
          a = _mm256_xor_si256(a, _mm256_set1_epi8(-128));
          p0 = _mm256_maddubs_epi16(_mm256_abs_epi8(w0), _mm256_sign_epi8(a, w0));
          p1 = _mm256_maddubs_epi16(_mm256_abs_epi8(w1), _mm256_sign_epi8(a, w1));
        }
        pairs[r][0] = step == 0 ? p0 : _mm256_add_epi16(pairs[r][0], p0);
        pairs[r][1] = step == 0 ? p1 : _mm256_add_epi16(pairs[r][1], p1);
        in_register(&pairs[r][0]), in_register(&pairs[r][1]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(pairs[r][0], ones));
      sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(pairs[r][1], ones));
    }
  }
}
#endif

// ROWS rows with the 16 columns of the panel: float totals into out[row][16].
template <int ROWS, int RUN>
__attribute__((noinline)) void panel_rows(const LowBitLinear& problem, int64_t row, Panel panel, float* out) {
  const int64_t blocks = problem.blocks, block_codes = problem.block;
  const float* code_scales = problem.code_scales + row * blocks;
  for (int r = 0; r < ROWS * 2; ++r) _mm256_store_ps(out + 8 * r, _mm256_setzero_ps());
  BlockCursor cursor = {block_codes, problem.blocks_per_group};
  for (; cursor.block < blocks; cursor.next_block()) {
    const int64_t block = cursor.block;
    __m256i sums[ROWS][2];
    const __m256i start0 = _mm256_load_si256(vector_at(panel.starts + block * kPanelColumns));
    const __m256i start1 = _mm256_load_si256(vector_at(panel.starts + block * kPanelColumns + 8));
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = RUN > 0 ? start0 : _mm256_setzero_si256();
      sums[r][1] = RUN > 0 ? start1 : _mm256_setzero_si256();
    }
    block_sums<ROWS, RUN>(problem.codes + row * problem.code_stride + block * block_codes, problem.code_stride,
                          panel.weights + block * block_codes * kPanelColumns, block_codes / 4, sums);
    const float* scales = panel.scales + cursor.group * kPanelColumns;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m256 code_scale = _mm256_set1_ps(code_scales[r * blocks + block]);
#pragma GCC unroll 2
      for (int c = 0; c < 2; ++c) {
        const __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(sums[r][c]), _mm256_load_ps(scales + 8 * c));
        float* total = out + r * kPanelColumns + 8 * c;
        _mm256_store_ps(total, _mm256_add_ps(_mm256_load_ps(total), _mm256_mul_ps(scaled, code_scale)));
      }
    }
  }
}

using PanelKernel = void (*)(const LowBitLinear&, int64_t, Panel, float*);
#if NARROWCAST_DOT_256
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1, 1>, panel_rows<2, 1>, panel_rows<3, 1>,
                                                   panel_rows<4, 1>, panel_rows<5, 1>, panel_rows<6, 1>};

const PanelKernel* panel_kernels(const LowBitLinear&) { return kPanelKernels; }

bool has_starting_sums(const PanelKernel*) { return true; }
#else
template <int RUN>
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1, RUN>, panel_rows<2, RUN>, panel_rows<3, RUN>};

// The kernels for the largest magnitude that a weight may have.
const PanelKernel* panel_kernels(const LowBitLinear& problem) {
  const int32_t top = (1 << problem.bits) - 1;
  int32_t largest = problem.zero_point != nullptr ? top : problem.zero > top - problem.zero ? problem.zero
                                                                                             : top - problem.zero;
  if (problem.levels != nullptr) {
    largest = 0;
    for (int index = 0; index < 16; ++index) {
      const int32_t value = problem.levels[index] - problem.zero;
      largest = largest > value ? largest : value;
      largest = largest > -value ? largest : -value;
    }
  }
  if (largest <= 16) return kPanelKernels<4>;
  if (largest <= 32) return kPanelKernels<2>;
  return largest <= 64 ? kPanelKernels<1> : kPanelKernels<0>;
}

bool has_starting_sums(const PanelKernel* kernels) { return kernels != kPanelKernels<0>; }
#endif

void finish(const LowBitLinear& problem, int64_t first_row, int64_t row_count, Range columns, const float* totals) {
  for (int64_t column = columns.begin; column < columns.end; column += 8) {
    const int64_t count = columns.end - column;
    __m256 bias = _mm256_setzero_ps();
    if (problem.bias != nullptr) {
      bias = count >= 8 ? _mm256_loadu_ps(problem.bias + column)
                        : load8_tail<FloatType::float32>(problem.bias, column, count);
    }
    for (int64_t r = 0; r < row_count; ++r) {
      __m256 value = _mm256_load_ps(totals + r * kPanelColumns + (column - columns.begin));
      if (problem.bias != nullptr) value = _mm256_add_ps(value, bias);
      value = (__m256)fuse<Float8, Int8>(problem.fused, (Float8)value);
      store8(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, count, value);
    }
  }
}

void lowbit_tile(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const Expand expand = expand_body(problem);
  const PanelKernel* kernels = panel_kernels(problem);
  auto* scales = static_cast<float*>(scratch);
  auto* zero_points = reinterpret_cast<int32_t*>(scales + problem.groups * kPanelColumns);
  int32_t* starts = zero_points + problem.groups * kPanelColumns;
  const Panel panel = {scales, zero_points, starts, reinterpret_cast<int8_t*>(starts + problem.blocks * kPanelColumns)};
  alignas(32) float totals[kPanelRows * kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    for (int64_t first = 0; first < kPanelColumns; first += 8) {
      // Columns that do not exist repeat the last one; what they give is not stored.
      const int64_t start = smaller(column + first, columns.end - 1), count = smaller(8, columns.end - start);
      const Panel half = {scales + first, zero_points + first, starts + first, panel.weights + 4 * first};
      expand_groups(problem, start, count, half);
      expand(problem, start, count, half);
    }
    if (has_starting_sums(kernels)) start_sums(problem, panel);
    for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
      const int64_t count = smaller(kPanelRows, rows.end - row);
      kernels[count - 1](problem, row, panel, totals);
      finish(problem, row, count, part, totals);
    }
  }
}

int64_t lowbit_scratch(const LowBitLinear& problem) {
  return (8 * problem.groups + 4 * problem.blocks + problem.blocks * problem.block) * kPanelColumns;
}

}  // namespace
}  // namespace narrowcast
