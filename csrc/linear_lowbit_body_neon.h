// Low-bit linear tile for the Arm tiers. 16 columns are expanded once into a panel of signed bytes with the zero points
// subtracted; codes less 128 are signed bytes too, which SDOT and, with I8MM, SMMLA multiply.
#pragma once

#include "linear_lowbit.h"

#include <string.h>

#include "fused.h"
#include "simd_neon.h"

namespace narrowcast {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

constexpr int64_t kPanelColumns = 16;
constexpr int64_t kPanelRows = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What the rows of a panel share: scales [groups][16], the codes less 128 of kPanelRows rows, and the weights:
// [depth / 4][16][4], with I8MM [depth / 8][16][8].
struct Panel {
  float* scales;
  int8_t* codes;
  int8_t* weights;
};

inline float scale_at(const LowBitLinear& problem, int64_t index) {
  const float stored = problem.scale_is_half ? half_to_float(static_cast<const uint16_t*>(problem.scale)[index])
                                             : static_cast<const float*>(problem.scale)[index];
  return stored * problem.level_scale;
}

// 16 fields of BITS bits from `bytes` readable bytes on; zeros behind them.
template <int BITS>
inline uint8x16_t unpack16(const uint8_t* packed, int64_t bytes) {
  uint8x16_t stream;
  if (bytes >= 16) {
    stream = vld1q_u8(packed);
  } else {
    uint8_t padded[16] = {};
    if (bytes > 0) memcpy(padded, packed, static_cast<size_t>(bytes));
    stream = vld1q_u8(padded);
  }
  if constexpr (BITS == 8) return stream;
  // The two bytes that hold a field, shifted down and masked.
  alignas(16) uint8_t low_bytes[16], high_bytes[16];
  alignas(16) int16_t shifts[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    low_bytes[2 * i] = static_cast<uint8_t>(i * BITS / 8);
    low_bytes[2 * i + 1] = static_cast<uint8_t>(i * BITS / 8 + 1);
    high_bytes[2 * i] = static_cast<uint8_t>(BITS + i * BITS / 8);
    high_bytes[2 * i + 1] = static_cast<uint8_t>(BITS + i * BITS / 8 + 1);
    shifts[i] = static_cast<int16_t>(-(i * BITS % 8));
  }
  const int16x8_t shift = vld1q_s16(shifts);
  const auto fields = [&](const uint8_t* order) {
    return vmovn_u16(vshlq_u16(vreinterpretq_u16_u8(vqtbl1q_u8(stream, vld1q_u8(order))), shift));
  };
  return vandq_u8(vcombine_u8(fields(low_bytes), fields(high_bytes)), vdupq_n_u8((1 << BITS) - 1));
}

template <int BITS, bool LEVELS>
inline uint8x16_t levels16(uint8x16_t fields, uint8x16_t table) {
  if constexpr (BITS == 8) return veorq_u8(fields, vdupq_n_u8(128));
  if constexpr (LEVELS) return vqtbl1q_u8(table, fields);
  return fields;
}

// Inputs of one column that stand together in the panel.
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr int64_t kWord = 8;
#else
constexpr int64_t kWord = 4;
#endif

// Expands up to 16 stored weight rows.
template <int BITS, bool LEVELS>
__attribute__((noinline)) void expand_weights(const LowBitLinear& problem, Range columns, Panel panel) {
  const uint8x16_t table = LEVELS ? vld1q_u8(problem.levels) : vdupq_n_u8(0);
  const int64_t depth = problem.blocks * problem.block, inputs = problem.block * problem.blocks_per_group;
  for (int64_t c = 0; c < kPanelColumns; ++c) {
    // Columns that do not exist repeat the last one; what they give is not stored.
    const int64_t column = smaller(columns.begin + c, columns.end - 1);
    const uint8_t* row = problem.weight + column * problem.row_bytes;
    for (int64_t k = 0; k < depth; k += 16) {
      const int64_t index = column * problem.groups + k / inputs, at = k / 8 * BITS;
      const uint8_t zero_point = problem.zero_point != nullptr ? problem.zero_point[index] & ((1 << BITS) - 1) : problem.zero;
      const uint8x16_t levels = levels16<BITS, LEVELS>(unpack16<BITS>(row + smaller(at, problem.row_bytes),
                                                                      problem.row_bytes - at), table);
      alignas(16) uint8_t weights[16];
      vst1q_u8(weights, vsubq_u8(levels, vdupq_n_u8(zero_point)));
      int8_t* target = panel.weights + k * kPanelColumns + c * kWord;
#pragma GCC unroll 4
      for (int64_t word = 0; word < 16 / kWord; ++word) {
        memcpy(target + word * kWord * kPanelColumns, weights + word * kWord, kWord);
      }
    }
  }
}

using Expand = void (*)(const LowBitLinear&, Range, Panel);

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

void expand_scales(const LowBitLinear& problem, Range columns, float* scales) {
  for (int64_t c = 0; c < kPanelColumns; ++c) {
    const int64_t column = smaller(columns.begin + c, columns.end - 1);
    for (int64_t group = 0; group < problem.groups; ++group) {
      scales[group * kPanelColumns + c] = scale_at(problem, column * problem.groups + group);
    }
  }
}

inline int8x16_t signed_codes(const uint8_t* codes) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(codes), vdupq_n_u8(128))); }

#if defined(__ARM_FEATURE_MATMUL_INT8)
// [pair][depth / 8][2][8]; a missing second row repeats the first.
void prepare_rows(const LowBitLinear& problem, int64_t row, int64_t count, int8_t* target) {
  const int64_t depth = problem.blocks * problem.block;
  for (int64_t r = 0; r < count; r += 2) {
    const uint8_t* first = problem.codes + (row + r) * problem.code_stride;
    const uint8_t* second = first + (r + 1 < count ? problem.code_stride : 0);
    for (int64_t k = 0; k < depth; k += 16, target += 32) {
      const int8x16_t a = signed_codes(first + k), b = signed_codes(second + k);
      vst1q_s8(target, vcombine_s8(vget_low_s8(a), vget_low_s8(b)));
      vst1q_s8(target + 16, vcombine_s8(vget_high_s8(a), vget_high_s8(b)));
    }
  }
}

// PAIRS pairs of rows with the 8 columns from `column` on: float totals into out[row][16]. SMMLA multiplies 2 x 8 by 8 x 2.
template <int PAIRS>
__attribute__((noinline)) void panel_half(const LowBitLinear& problem, const float* const* code_scales, Panel panel,
                                          int64_t column, float* out) {
  const int64_t depth = problem.blocks * problem.block;
  float32x4_t totals[PAIRS][4];
#pragma GCC unroll 2
  for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) totals[p][c] = vdupq_n_f32(0.0f);
  }
  const int8_t *weights = panel.weights + 8 * column, *codes = panel.codes;
  for (int64_t block = 0; block < problem.blocks; ++block) {
    int32x4_t sums[PAIRS][4];
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[p][c] = vdupq_n_s32(0);
    }
    for (int64_t k = 0; k < problem.block; k += 8, weights += 8 * kPanelColumns, codes += 16) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const int8x16_t w = vld1q_s8(weights + 16 * c);
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p) sums[p][c] = vmmlaq_s32(sums[p][c], vld1q_s8(codes + p * 2 * depth), w);
      }
    }
    const float* scales = panel.scales + block / problem.blocks_per_group * kPanelColumns + column;
#pragma GCC unroll 2
    for (int p = 0; p < PAIRS; ++p) {
      const float32x4_t code_scale =
          vcombine_f32(vdup_n_f32(code_scales[2 * p][block]), vdup_n_f32(code_scales[2 * p + 1][block]));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const float32x2_t two = vld1_f32(scales + 2 * c);
        const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(sums[p][c]), vcombine_f32(two, two));
        totals[p][c] = vaddq_f32(totals[p][c], vmulq_f32(scaled, code_scale));
      }
    }
  }
#pragma GCC unroll 2
  for (int p = 0; p < PAIRS; ++p) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      vst1_f32(out + 2 * p * kPanelColumns + column + 2 * c, vget_low_f32(totals[p][c]));
      vst1_f32(out + (2 * p + 1) * kPanelColumns + column + 2 * c, vget_high_f32(totals[p][c]));
    }
  }
}

void panel_rows(const LowBitLinear& problem, int64_t row, int64_t count, Panel panel, float* out) {
  const float* code_scales[kPanelRows];
  for (int64_t r = 0; r < kPanelRows; ++r) {
    code_scales[r] = problem.code_scales + (row + smaller(r, count - 1)) * problem.blocks;
  }
  for (int64_t column = 0; column < kPanelColumns; column += 8) {
    if (count > 2) panel_half<2>(problem, code_scales, panel, column, out);
    else panel_half<1>(problem, code_scales, panel, column, out);
  }
}
#else
void prepare_rows(const LowBitLinear& problem, int64_t row, int64_t count, int8_t* target) {
  const int64_t depth = problem.blocks * problem.block;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* codes = problem.codes + (row + r) * problem.code_stride;
    for (int64_t k = 0; k < depth; k += 16, target += 16) vst1q_s8(target, signed_codes(codes + k));
  }
}

// ROWS rows with the 16 columns of the panel: float totals into out[row][16].
template <int ROWS>
__attribute__((noinline)) void rows_of(const LowBitLinear& problem, int64_t row, Panel panel, float* out) {
  const int64_t depth = problem.blocks * problem.block;
  const int8_t *weights = panel.weights, *codes = panel.codes;
  for (int64_t i = 0; i < ROWS * kPanelColumns; i += 4) vst1q_f32(out + i, vdupq_n_f32(0.0f));
  for (int64_t block = 0; block < problem.blocks; ++block) {
    int32x4_t sums[ROWS][4];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = vdupq_n_s32(0);
    }
    for (int64_t k = 0; k < problem.block; k += 16, codes += 16) {
      int8x16_t a[ROWS];
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) a[r] = vld1q_s8(codes + r * depth);
#define NARROWCAST_WORD(word)                                                                            \
  _Pragma("GCC unroll 4") for (int c = 0; c < 4; ++c) {                                                  \
    const int8x16_t w = vld1q_s8(weights + 16 * c);                                                      \
    _Pragma("GCC unroll 4") for (int r = 0; r < ROWS; ++r) {                                             \
      sums[r][c] = vdotq_laneq_s32(sums[r][c], w, a[r], word);                                           \
    }                                                                                                    \
  }                                                                                                      \
  weights += 4 * kPanelColumns;
      NARROWCAST_WORD(0)
      NARROWCAST_WORD(1)
      NARROWCAST_WORD(2)
      NARROWCAST_WORD(3)
#undef NARROWCAST_WORD
    }
    const float* scales = panel.scales + block / problem.blocks_per_group * kPanelColumns;
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const float code_scale = problem.code_scales[(row + r) * problem.blocks + block];
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(sums[r][c]), vld1q_f32(scales + 4 * c));
        float* total = out + r * kPanelColumns + 4 * c;
        vst1q_f32(total, vaddq_f32(vld1q_f32(total), vmulq_n_f32(scaled, code_scale)));
      }
    }
  }
}

void panel_rows(const LowBitLinear& problem, int64_t row, int64_t count, Panel panel, float* out) {
  if (count == 4) return rows_of<4>(problem, row, panel, out);
  if (count == 3) return rows_of<3>(problem, row, panel, out);
  if (count == 2) return rows_of<2>(problem, row, panel, out);
  rows_of<1>(problem, row, panel, out);
}
#endif

void finish(const LowBitLinear& problem, int64_t first_row, int64_t row_count, Range columns, const float* totals) {
  for (int64_t column = columns.begin; column < columns.end; column += 4) {
    const int64_t count = columns.end - column;
    for (int64_t r = 0; r < row_count; ++r) {
      float32x4_t value = vld1q_f32(totals + r * kPanelColumns + (column - columns.begin));
      if (problem.bias != nullptr) {
        value = vaddq_f32(value, load4_tail<FloatType::float32>(problem.bias, column, count));
      }
      value = (float32x4_t)fuse<Float4, Int4>(problem.fused, (Float4)value);
      store4(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, count, value);
    }
  }
}

void lowbit_tile(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const Expand expand = expand_body(problem);
  const int64_t depth = problem.blocks * problem.block;
  auto* scales = static_cast<float*>(scratch);
  auto* codes = reinterpret_cast<int8_t*>(scales + problem.groups * kPanelColumns);
  const Panel panel = {scales, codes, codes + kPanelRows * depth};
  float totals[kPanelRows * kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    expand_scales(problem, part, scales);
    expand(problem, part, panel);
    for (int64_t row = rows.begin; row < rows.end; row += kPanelRows) {
      const int64_t count = smaller(kPanelRows, rows.end - row);
      prepare_rows(problem, row, count, codes);
      panel_rows(problem, row, count, panel, totals);
      finish(problem, row, count, part, totals);
    }
  }
}

int64_t lowbit_scratch(const LowBitLinear& problem) {
  return 4 * problem.groups * kPanelColumns + problem.blocks * problem.block * (kPanelColumns + kPanelRows);
}

}  // namespace
}  // namespace narrowcast
