// int8 linear tile for the Arm tiers. SDOT wants two signed operands: codes are taken less 128, and 128 times the sums
// of the weights are added back. Compiled with I8MM, USDOT and USMMLA take the codes as they are.
//
// Few rows: 4 stored weight rows at a time along K. Many rows: columns are copied once into panels whose order suits
// the instruction, and a register tile runs over all rows.
#pragma once

#include "linear.h"

#include <string.h>

#include "fused.h"
#include "simd_neon.h"

namespace narrowcast {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedCodes = false;
constexpr int64_t kDepthStep = 8;  // inputs of one column that stand together in a panel
constexpr int64_t kPanelColumns = 8;
constexpr int64_t kPanelRows = 8;
#else
constexpr bool kSignedCodes = true;
constexpr int64_t kDepthStep = 16;
constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelRows = 4;
#endif

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t padded(int64_t depth) { return (depth + kDepthStep - 1) / kDepthStep * kDepthStep; }

// Four products of neighbouring codes and weights are added to every lane.
inline int32x4_t dot(int32x4_t sum, uint8x16_t codes, int8x16_t weight) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
  return vusdotq_s32(sum, codes, weight);
#else
  return vdotq_s32(sum, veorq_s8(vreinterpretq_s8_u8(codes), vdupq_n_s8(-128)), weight);
#endif
}

// Adds 128 times the weights, in two steps since 128 is no int8.
inline int32x4_t add_weights(int32x4_t sum, int8x16_t weight) {
  if constexpr (!kSignedCodes) return sum;
  return vdotq_s32(vdotq_s32(sum, weight, vdupq_n_s8(64)), weight, vdupq_n_s8(64));
}

// The sums of ROWS rows with 4 columns, 16 inputs at a time.
template <int ROWS>
struct ColumnSums {
  int32x4_t sums[ROWS][4], start[4];

  __attribute__((always_inline)) inline void add(const uint8_t* codes, int64_t stride, const int8x16_t w[4]) {
    uint8x16_t a[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) a[r] = vld1q_u8(codes + r * stride);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      start[c] = add_weights(start[c], w[c]);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) sums[r][c] = dot(sums[r][c], a[r], w[c]);
    }
  }
};

// Sums of ROWS rows with up to 4 columns from the stored rows; codes are readable up to a multiple of 16.
template <int ROWS>
__attribute__((noinline)) void dot_columns(const Int8Linear& problem, int64_t row, Range columns, int32_t* out,
                                           int64_t stride) {
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  const int8_t* weight[4];
  for (int c = 0; c < 4; ++c) weight[c] = problem.weight + smaller(columns.begin + c, columns.end - 1) * problem.depth;
  ColumnSums<ROWS> sums;
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    sums.start[c] = vdupq_n_s32(0);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) sums.sums[r][c] = vdupq_n_s32(0);
  }
  int64_t k = 0;
  for (; k + 16 <= problem.depth; k += 16) {
    const int8x16_t w[4] = {vld1q_s8(weight[0] + k), vld1q_s8(weight[1] + k), vld1q_s8(weight[2] + k),
                            vld1q_s8(weight[3] + k)};
    sums.add(codes + k, problem.code_stride, w);
  }
  if (k < problem.depth) {
    int8_t rest[4][16] = {};
    for (int c = 0; c < 4; ++c) memcpy(rest[c], weight[c] + k, static_cast<size_t>(problem.depth - k));
    const int8x16_t w[4] = {vld1q_s8(rest[0]), vld1q_s8(rest[1]), vld1q_s8(rest[2]), vld1q_s8(rest[3])};
    sums.add(codes + k, problem.code_stride, w);
  }
  const auto total = [](const int32x4_t* v) { return vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3])); };
  const int32x4_t first = total(sums.start);
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) vst1q_s32(out + r * stride, vaddq_s32(total(sums.sums[r]), first));
}

using ColumnKernel = void (*)(const Int8Linear&, int64_t, Range, int32_t*, int64_t);
constexpr ColumnKernel kColumnKernels[4] = {dot_columns<1>, dot_columns<2>, dot_columns<3>, dot_columns<4>};

// Copies up to kPanelColumns stored rows into a panel, zeros where there is no weight. I8MM: [depth / 8][columns][8].
// Else [depth / 16][4][columns][4], behind the 128-fold column sums.
void pack_panel(const Int8Linear& problem, Range columns, int8_t* panel) {
  const int64_t depth = problem.depth, count = columns.end - columns.begin;
  int32_t start[kPanelColumns] = {};
  int8_t* target = panel + (kSignedCodes ? sizeof start : 0);
  for (int64_t c = 0; c < kPanelColumns; ++c) {
    const int8_t* weight = problem.weight + (columns.begin + smaller(c, count - 1)) * depth;
    int32x4_t total = vdupq_n_s32(0);
    for (int64_t k = 0; k < depth; k += kDepthStep) {
      int8_t bytes[kDepthStep] = {};
      if (c < count) memcpy(bytes, weight + k, static_cast<size_t>(smaller(kDepthStep, depth - k)));
      if constexpr (kSignedCodes) {
        total = add_weights(total, vld1q_s8(bytes));
        for (int64_t word = 0; word < 4; ++word) {
          memcpy(target + (k / 4 + word) * 4 * kPanelColumns + 4 * c, bytes + 4 * word, 4);
        }
      } else {
        memcpy(target + k * kPanelColumns + c * kDepthStep, bytes, kDepthStep);
      }
    }
    start[c] = vaddvq_s32(total);
  }
  if constexpr (kSignedCodes) memcpy(panel, start, sizeof start);
}

inline int64_t panel_bytes(int64_t depth) {
  return kPanelColumns * (padded(depth) + (kSignedCodes ? static_cast<int64_t>(sizeof(int32_t)) : 0));
}

#if defined(__ARM_FEATURE_MATMUL_INT8)
// PAIRS pairs of rows, interleaved by 8 codes, with 8 columns; USMMLA multiplies 2 x 8 by 8 x 2.
template <int PAIRS>
__attribute__((noinline)) void panel_rows(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t depth,
                                          int32_t* out) {
  int32x4_t sums[PAIRS][4];
#pragma GCC unroll 4
  for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[p][c] = vdupq_n_s32(0);
  }
  for (int64_t k = 0; k < depth; k += 8, panel += 64, codes += 16) {
    int8x16_t w[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) w[c] = vld1q_s8(panel + 16 * c);
#pragma GCC unroll 4
    for (int p = 0; p < PAIRS; ++p) {
      const uint8x16_t a = vld1q_u8(codes + p * stride);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[p][c] = vusmmlaq_s32(sums[p][c], a, w[c]);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      vst1_s32(out + 2 * p * kPanelColumns + 2 * c, vget_low_s32(sums[p][c]));
      vst1_s32(out + (2 * p + 1) * kPanelColumns + 2 * c, vget_high_s32(sums[p][c]));
    }
  }
}

// Pairs of rows of codes, [pair][depth / 8][2][8]; a missing second row repeats the first.
void prepare_rows(const Int8Linear& problem, int64_t row, int64_t count, uint8_t* target) {
  for (int64_t r = 0; r < count; r += 2) {
    const uint8_t* first = problem.codes + (row + r) * problem.code_stride;
    const uint8_t* second = first + (r + 1 < count ? problem.code_stride : 0);
    for (int64_t k = 0; k < padded(problem.depth); k += 8, target += 16) {
      vst1q_u8(target, vcombine_u8(vld1_u8(first + k), vld1_u8(second + k)));
    }
  }
}

void multiply_panel(int64_t count, const uint8_t* codes, const int8_t* panel, int64_t depth, int32_t* out) {
  const int64_t stride = 2 * padded(depth);
  if (count > 6) return panel_rows<4>(codes, stride, panel, depth, out);
  if (count > 4) return panel_rows<3>(codes, stride, panel, depth, out);
  if (count > 2) return panel_rows<2>(codes, stride, panel, depth, out);
  panel_rows<1>(codes, stride, panel, depth, out);
}
#else
template <int ROWS>
__attribute__((noinline)) void panel_rows(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t depth,
                                          int32_t* out) {
  int32x4_t sums[ROWS][4];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[r][c] = vld1q_s32(reinterpret_cast<const int32_t*>(panel) + 4 * c);
  }
  panel += 4 * kPanelColumns;
  for (int64_t k = 0; k < depth; k += 16) {
    int8x16_t a[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) a[r] = vreinterpretq_s8_u8(vld1q_u8(codes + r * stride + k));
#define NARROWCAST_WORD(word)                                                                  \
  _Pragma("GCC unroll 4") for (int c = 0; c < 4; ++c) {                                        \
    const int8x16_t w = vld1q_s8(panel + 16 * c);                                              \
    _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) {                                   \
      sums[r][c] = vdotq_laneq_s32(sums[r][c], w, a[r], word);                                 \
    }                                                                                          \
  }                                                                                            \
  panel += 4 * kPanelColumns;
    NARROWCAST_WORD(0)
    NARROWCAST_WORD(1)
    NARROWCAST_WORD(2)
    NARROWCAST_WORD(3)
#undef NARROWCAST_WORD
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) vst1q_s32(out + r * kPanelColumns + 4 * c, sums[r][c]);
  }
}

// Rows of codes less 128.
void prepare_rows(const Int8Linear& problem, int64_t row, int64_t count, uint8_t* target) {
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* codes = problem.codes + (row + r) * problem.code_stride;
    for (int64_t k = 0; k < padded(problem.depth); k += 16, target += 16) {
      vst1q_u8(target, veorq_u8(vld1q_u8(codes + k), vdupq_n_u8(128)));
    }
  }
}

void multiply_panel(int64_t count, const uint8_t* codes, const int8_t* panel, int64_t depth, int32_t* out) {
  const int64_t stride = padded(depth);
  if (count == 4) return panel_rows<4>(codes, stride, panel, depth, out);
  if (count == 3) return panel_rows<3>(codes, stride, panel, depth, out);
  if (count == 2) return panel_rows<2>(codes, stride, panel, depth, out);
  panel_rows<1>(codes, stride, panel, depth, out);
}
#endif

// Turns `row_count` rows of sums, `stride` apart, into output values.
void finish(const Int8Linear& problem, int64_t first_row, int64_t row_count, Range columns, const int32_t* sums,
            int64_t stride) {
  for (int64_t r = 0; r < row_count; ++r) {
    const int64_t row = first_row + r;
    for (int64_t column = columns.begin; column < columns.end; column += 4) {
      const int64_t count = columns.end - column;
      const int32x4_t offset =
          vreinterpretq_s32_f32(load4_tail<FloatType::float32>(problem.offset, column, count));
      const float32x4_t scale = load4_tail<FloatType::float32>(problem.scale, column, count);
      const int32x4_t sum = vmlsq_n_s32(vld1q_s32(sums + r * stride + (column - columns.begin)), offset,
                                        problem.row_offset[row]);
      float32x4_t value = vmulq_f32(vcvtq_f32_s32(sum), vmulq_n_f32(scale, problem.row_scale[row]));
      if (problem.bias != nullptr) {
        value = vaddq_f32(value, load4_tail<FloatType::float32>(problem.bias, column, count));
      }
      value = (float32x4_t)fuse<Float4, Int4>(problem.fused, (Float4)value);
      store4(problem.out, problem.out_type, row * problem.out_stride + column, count, value);
    }
  }
}

void few_rows(const Int8Linear& problem, Range rows, Range columns) {
  int32_t sums[4 * kColumnTile];
  for (int64_t row = rows.begin; row < rows.end; row += 4) {
    const int64_t count = smaller(4, rows.end - row);
    for (int64_t column = columns.begin; column < columns.end; column += 4) {
      kColumnKernels[count - 1](problem, row, {column, columns.end}, sums + (column - columns.begin), kColumnTile);
    }
    finish(problem, row, count, columns, sums, kColumnTile);
  }
}

void many_rows(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  int32_t sums[kPanelRows * kPanelColumns];
  const int64_t tiles = (columns.end - columns.begin + kPanelColumns - 1) / kPanelColumns;
  const int64_t bytes = panel_bytes(problem.depth);
  auto* panels = static_cast<int8_t*>(scratch);
  auto* codes = reinterpret_cast<uint8_t*>(panels + tiles * bytes);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t column = columns.begin + tile * kPanelColumns;
    pack_panel(problem, {column, smaller(column + kPanelColumns, columns.end)}, panels + tile * bytes);
  }
  for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
    const int64_t count = smaller(kPanelRows, rows.end - row);
    prepare_rows(problem, row, count, codes);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t column = columns.begin + tile * kPanelColumns;
      multiply_panel(count, codes, panels + tile * bytes, problem.depth, sums);
      finish(problem, row, count, {column, smaller(column + kPanelColumns, columns.end)}, sums, kPanelColumns);
    }
  }
}

void int8_tile(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  for (int64_t column = columns.begin; column < columns.end; column += kColumnTile) {
    const Range part = {column, smaller(column + kColumnTile, columns.end)};
    if (rows.end - rows.begin >= 8) {
      many_rows(problem, rows, part, scratch);
    } else {
      few_rows(problem, rows, part);
    }
  }
}

// Panels of 64 columns and the codes of one tile's rows.
int64_t int8_scratch(int64_t depth) {
  return kColumnTile / kPanelColumns * panel_bytes(depth) + kPanelRows * padded(depth);
}

}  // namespace
}  // namespace narrowcast
