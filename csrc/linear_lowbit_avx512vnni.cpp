// Low-bit linear tile, AVX-512 VNNI.
//
// One or two rows: 16 stored weight rows at a time, expanded in registers; the levels are the unsigned operand of vpdpbusd.
// More rows: 32 columns are expanded once into a panel of signed bytes with the zero points already subtracted. The
// activation codes, which have 128 added, are then the unsigned operand, and every int32 sum starts at -128 times the sum
// of its block's weights. So one inner loop serves every format, and a zero point costs nothing in it.
#include "linear_lowbit.h"

#include "fused.h"
#include "simd_avx512.h"
#include "transpose_avx512.h"
#include "unpack_avx512.h"

namespace narrowcast {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef int32_t Int16 __attribute__((vector_size(64)));

constexpr int64_t kPanelColumns = 32;
constexpr int64_t kPanelRows = 6;
constexpr int64_t kFewRows = 2;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales [groups][WIDTH] and zero points, the byte four times in each int32, [groups][WIDTH], of WIDTH columns.
struct Groups {
  float* scales;
  int32_t* zero_points;
};

// What the rows of a panel share: groups, starting sums [blocks][32], signed weights [blocks * block / 4][32][4].
struct Panel {
  Groups groups;
  int32_t* starts;
  int8_t* weights;
};

// Scales of 16 columns; lane c of the result's row g is group `group + g` of column c.
inline void load_scales(const LowBitLinear& problem, int64_t column, int64_t count, int64_t group, __m512i* tile) {
  const __mmask16 mask = lanes16(problem.groups - group);
  const __m512 factor = _mm512_set1_ps(problem.level_scale);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
    const __m512 scale = problem.scale_is_half ? load16<FloatType::float16>(problem.scale, index, mask)
                                               : load16<FloatType::float32>(problem.scale, index, mask);
    tile[c] = _mm512_castps_si512(_mm512_mul_ps(scale, factor));
  }
}

inline void load_zero_points(const LowBitLinear& problem, int64_t column, int64_t count, int64_t group,
                             __m512i* tile) {
  const __m512i field_mask = _mm512_set1_epi32((1 << problem.bits) - 1);
  const __mmask16 mask = lanes16(problem.groups - group);
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const int64_t index = (column + smaller(c, count - 1)) * problem.groups + group;
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, problem.zero_point + index);
    const __m512i low_bits = _mm512_and_si512(_mm512_cvtepu8_epi32(bytes), field_mask);
    tile[c] = _mm512_mullo_epi32(low_bits, _mm512_set1_epi32(0x01010101));
  }
}

template <int WIDTH>
void expand_groups(const LowBitLinear& problem, int64_t column, int64_t count, Groups groups) {
  __m512i tile[16];
  for (int64_t group = 0; group < problem.groups; group += 16) {
    const int64_t steps = smaller(16, problem.groups - group);
    load_scales(problem, column, count, group, tile);
    transpose16(tile);
    for (int64_t g = 0; g < steps; ++g) _mm512_store_si512(groups.scales + (group + g) * WIDTH, tile[g]);
    if (problem.zero_point == nullptr) continue;
    load_zero_points(problem, column, count, group, tile);
    transpose16(tile);
    for (int64_t g = 0; g < steps; ++g) _mm512_store_si512(groups.zero_points + (group + g) * WIDTH, tile[g]);
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

// Expands up to 16 stored weight rows to the columns [first, first + 16) of the panel.
template <int BITS, bool LEVELS>
__attribute__((noinline)) void expand_weights(const LowBitLinear& problem, int64_t column, int64_t count, Panel panel) {
  const __m512i table = level_table(problem);
  const uint8_t* weight = problem.weight + column * problem.row_bytes;
  const int64_t depth = problem.blocks * problem.block;
  const __m512i constant = _mm512_set1_epi8(static_cast<char>(problem.zero));
  for (int64_t block = 0; block < problem.blocks; ++block) {
    _mm512_store_si512(panel.starts + block * kPanelColumns, _mm512_setzero_si512());
  }
  for (int64_t k = 0; k < depth; k += 64) {
    const int64_t offset = k / 8 * BITS;
    const __mmask64 mask = packed_mask64<BITS>(problem.row_bytes - offset);
    __m512i tile[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const uint8_t* source = weight + smaller(c, count - 1) * problem.row_bytes + offset;
      tile[c] = levels64<BITS, LEVELS>(_mm512_maskz_loadu_epi8(mask, source), table);
    }
    transpose16(tile);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // 16 codes each: never in two blocks
      if (k + 16 * part >= depth) break;
      const int64_t block = (k + 16 * part) / problem.block;
      const __m512i zero_point =
          problem.zero_point != nullptr
              ? _mm512_load_si512(panel.groups.zero_points + block / problem.blocks_per_group * kPanelColumns)
              : constant;
      __m512i sum = _mm512_setzero_si512();
      int8_t* target = panel.weights + (k + 16 * part) * kPanelColumns;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        const __m512i values = _mm512_sub_epi8(tile[4 * part + quad], zero_point);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), values);
        _mm512_store_si512(target + quad * 4 * kPanelColumns, values);
      }
      int32_t* start = panel.starts + block * kPanelColumns;
      _mm512_store_si512(start, _mm512_sub_epi32(_mm512_load_si512(start), sum));
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

// ROWS rows with the 32 columns of the panel: float totals into out[row][32]. A block is `repeats` times QUADS * 4 codes.
template <int ROWS, int QUADS>
__attribute__((noinline)) void panel_rows(const LowBitLinear& problem, int64_t row, Panel panel, float* out) {
  const int64_t stride = problem.code_stride, blocks = problem.blocks, repeats = problem.block / (4 * QUADS);
  const uint8_t* codes = problem.codes + row * stride;
  const float* code_scales = problem.code_scales + row * blocks;
  const int8_t* weights = panel.weights;
  const float* scales = panel.groups.scales;
  int64_t left_in_group = problem.blocks_per_group;
  __m512 totals[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) totals[r][0] = totals[r][1] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block, ++code_scales) {
    __m512i sums[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      sums[r][0] = _mm512_load_si512(panel.starts + block * kPanelColumns);
      sums[r][1] = _mm512_load_si512(panel.starts + block * kPanelColumns + 16);
    }
    for (int64_t repeat = 0; repeat < repeats; ++repeat, weights += QUADS * 4 * kPanelColumns, codes += 4 * QUADS) {
#pragma GCC unroll 16
      for (int quad = 0; quad < QUADS; ++quad) {
        const __m512i w0 = _mm512_load_si512(weights + quad * 128), w1 = _mm512_load_si512(weights + quad * 128 + 64);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; ++r) {
          int32_t four;
          memcpy(&four, codes + r * stride + 4 * quad, 4);
          const __m512i a = _mm512_set1_epi32(four);
          sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, w0);
          sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], a, w1);
        }
      }
    }
    const __m512 scale0 = _mm512_load_ps(scales), scale1 = _mm512_load_ps(scales + 16);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m512 code_scale = _mm512_set1_ps(code_scales[r * blocks]);
      const __m512 term0 = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][0]), scale0), code_scale);
      const __m512 term1 = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][1]), scale1), code_scale);
      totals[r][0] = _mm512_add_ps(totals[r][0], term0);
      totals[r][1] = _mm512_add_ps(totals[r][1], term1);
    }
    if (--left_in_group == 0) scales += kPanelColumns, left_in_group = problem.blocks_per_group;
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm512_store_ps(out + r * kPanelColumns, totals[r][0]);
    _mm512_store_ps(out + r * kPanelColumns + 16, totals[r][1]);
  }
}

using PanelKernel = void (*)(const LowBitLinear&, int64_t, Panel, float*);
template <int QUADS>
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1, QUADS>, panel_rows<2, QUADS>, panel_rows<3, QUADS>,
                                                   panel_rows<4, QUADS>, panel_rows<5, QUADS>, panel_rows<6, QUADS>};

// Bias, activation function and conversion of totals[row][kPanelColumns].
void finish(const LowBitLinear& problem, int64_t first_row, int64_t row_count, Range columns, const float* totals) {
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const __mmask16 mask = lanes16(columns.end - column);
    const __m512 bias =
        problem.bias != nullptr ? _mm512_maskz_loadu_ps(mask, problem.bias + column) : _mm512_setzero_ps();
    for (int64_t r = 0; r < row_count; ++r) {
      __m512 value = _mm512_load_ps(totals + r * kPanelColumns + (column - columns.begin));
      if (problem.bias != nullptr) value = _mm512_add_ps(value, bias);
      value = (__m512)fuse<Float16, Int16>(problem.fused, (Float16)value);
      store16(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, mask, value);
    }
  }
}

Panel place_panel(const LowBitLinear& problem, void* scratch) {
  auto* scales = static_cast<float*>(scratch);
  auto* zero_points = reinterpret_cast<int32_t*>(scales + problem.groups * kPanelColumns);
  int32_t* starts = zero_points + problem.groups * kPanelColumns;
  return {{scales, zero_points}, starts, reinterpret_cast<int8_t*>(starts + problem.blocks * kPanelColumns)};
}

void many_rows(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const Expand expand = expand_body(problem);
  const PanelKernel* kernels = problem.block == 16   ? kPanelKernels<4>
                               : problem.block == 32 ? kPanelKernels<8>
                                                     : kPanelKernels<16>;
  const Panel panel = place_panel(problem, scratch);
  alignas(64) float totals[kPanelRows * kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    for (int64_t first = 0; first < kPanelColumns; first += 16) {
      // Columns that do not exist repeat the last one; what they give is not stored.
      const int64_t start = smaller(column + first, columns.end - 1), count = smaller(16, columns.end - start);
      const Groups groups = {panel.groups.scales + first, panel.groups.zero_points + first};
      expand_groups<kPanelColumns>(problem, start, count, groups);
      expand(problem, start, count, {groups, panel.starts + first, panel.weights + 4 * first});
    }
    const int64_t total = rows.end - rows.begin, steps = (total + kPanelRows - 1) / kPanelRows;
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      kernels[count - 1](problem, row, panel, totals);
      finish(problem, row, count, part, totals);
      row += count;
    }
  }
}

// The float term of one block of 16 columns.
inline __m512 block_term(const LowBitLinear& problem, __m512i sum, Groups groups, int64_t block, int32_t code_sum,
                         float code_scale) {
  const int64_t group = block / problem.blocks_per_group * 16;
  const __m512i zero_point = problem.zero_point != nullptr
                                 ? _mm512_srli_epi32(_mm512_load_si512(groups.zero_points + group), 24)
                                 : _mm512_set1_epi32(problem.zero);
  const __m512i product = _mm512_sub_epi32(sum, _mm512_mullo_epi32(zero_point, _mm512_set1_epi32(code_sum)));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(product), _mm512_load_ps(groups.scales + group)),
                       _mm512_set1_ps(code_scale));
}

// sums[c] += levels times signed codes, over 64 codes from k on.
template <int BITS, bool LEVELS>
inline void dot64(const uint8_t* const* weight, __mmask64 mask, int64_t offset, __m512i codes, __m512i table,
                  __m512i* sums) {
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const __m512i levels = levels64<BITS, LEVELS>(_mm512_maskz_loadu_epi8(mask, weight[c] + offset), table);
    sums[c] = _mm512_dpbusd_epi32(sums[c], levels, codes);
  }
}

// One row with 16 columns straight from the stored rows: their totals.
template <int BITS, bool LEVELS>
__attribute__((noinline)) __m512 dot_columns(const LowBitLinear& problem, int64_t row, const uint8_t* const* weight,
                                             Groups groups, const int32_t* code_sums) {
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  const float* code_scales = problem.code_scales + row * problem.blocks;
  const __m512i table = level_table(problem), flip = _mm512_set1_epi8(-128);
  const int64_t depth = problem.blocks * problem.block;
  __m512 total = _mm512_setzero_ps();
  for (int64_t k = 0, block = 0; k < depth;) {
    __m512i sums[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) sums[c] = _mm512_setzero_si512();
    const int64_t end = k + (problem.block > 64 ? problem.block : 64);
    for (; k < end; k += 64) {
      const int64_t offset = k / 8 * BITS;
      const __m512i signed_codes = _mm512_xor_si512(_mm512_loadu_si512(codes + k), flip);
      dot64<BITS, LEVELS>(weight, packed_mask64<BITS>(problem.row_bytes - offset), offset, signed_codes, table, sums);
    }
    if (problem.block >= 64) {
      total = _mm512_add_ps(total, block_term(problem, sum_lanes(sums), groups, block, code_sums[block],
                                              code_scales[block]));
      ++block;
      continue;
    }
    __m512i quads[4], lanes[4];
    sum_quads(sums, quads);
    transpose_lanes(quads, lanes);
    if (problem.block == 32) {
      lanes[0] = _mm512_add_epi32(lanes[0], lanes[1]);
      lanes[1] = _mm512_add_epi32(lanes[2], lanes[3]);
    }
    for (int64_t part = 0; part < 64 / problem.block && block < problem.blocks; ++part, ++block) {
      total = _mm512_add_ps(total, block_term(problem, lanes[part], groups, block, code_sums[block],
                                              code_scales[block]));
    }
  }
  return total;
}

using DotColumns = __m512 (*)(const LowBitLinear&, int64_t, const uint8_t* const*, Groups, const int32_t*);

DotColumns dot_body(const LowBitLinear& problem) {
  switch (problem.bits) {
    case 2: return dot_columns<2, false>;
    case 3: return dot_columns<3, false>;
    case 4: return problem.levels != nullptr ? dot_columns<4, true> : dot_columns<4, false>;
    case 5: return dot_columns<5, false>;
    case 6: return dot_columns<6, false>;
    default: return dot_columns<8, false>;
  }
}

// Sums of the signed codes of each block of one row.
void sum_codes(const LowBitLinear& problem, int64_t row, int32_t* sums) {
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  for (int64_t block = 0; block < problem.blocks; ++block, codes += problem.block) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < problem.block; k += 64) {
      const __m512i part = _mm512_maskz_loadu_epi8(lanes64(problem.block - k), codes + k);
      sum = _mm512_dpbusd_epi32(sum, part, _mm512_set1_epi8(1));
    }
    sums[block] = _mm512_reduce_add_epi32(sum) - static_cast<int32_t>(128 * problem.block);
  }
}

void few_rows(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const DotColumns dot = dot_body(problem);
  auto* scales = static_cast<float*>(scratch);
  auto* zero_points = reinterpret_cast<int32_t*>(scales + problem.groups * 16);
  const Groups groups = {scales, zero_points};
  int32_t* code_sums = zero_points + problem.groups * 16;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    sum_codes(problem, row, code_sums + (row - rows.begin) * problem.blocks);
  }
  alignas(64) float totals[kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const Range part = {column, smaller(column + 16, columns.end)};
    const uint8_t* weight[16];
    for (int64_t c = 0; c < 16; ++c) weight[c] = problem.weight + smaller(column + c, part.end - 1) * problem.row_bytes;
    expand_groups<16>(problem, column, part.end - column, groups);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      _mm512_store_ps(totals, dot(problem, row, weight, groups, code_sums + (row - rows.begin) * problem.blocks));
      finish(problem, row, 1, part, totals);
    }
  }
}

}  // namespace

void lowbit_tile_avx512vnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  if (rows.end - rows.begin <= kFewRows) return few_rows(problem, rows, columns, scratch);
  many_rows(problem, rows, columns, scratch);
}

int64_t lowbit_scratch_avx512vnni(const LowBitLinear& problem) {
  const int64_t depth = problem.blocks * problem.block;
  return (8 * problem.groups + 4 * problem.blocks + depth) * kPanelColumns;
}

}  // namespace narrowcast
