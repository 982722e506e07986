// Low-bit linear tile, AVX-512 VNNI: more than two rows (fewer: linear_lowbit_few_avx512vnni.cpp).
//
// 32 columns are expanded once into a panel of signed bytes with the zero points already subtracted. The activation
// codes, which have 128 added, are then the unsigned operand, and every int32 sum starts at -128 times the sum of its
// block's weights. So one inner loop serves every format, and a zero point costs nothing in it.
#include "linear_lowbit_avx512.h"

namespace narrowcast {
namespace {

constexpr int64_t kPanelRows = 6;
constexpr int64_t kFewRows = 2;

// What the rows of a panel share: groups, starting sums [blocks][32], signed weights [blocks * block / 4][32][4].
struct Panel {
  Groups groups;
  int32_t* starts;
  int8_t* weights;
};

// Expands up to 16 stored weight rows to the columns [first, first + 16) of the panel.
template <int BITS>
__attribute__((noinline)) void expand_weights(const LowBitLinear& problem, int64_t column, int64_t count, Panel panel) {
  const __m512i table = _mm512_setzero_si512();
  const uint8_t* weight = problem.weight + column * problem.row_bytes;
  const int64_t depth = problem.blocks * problem.block;
  const __m512i constant = _mm512_set1_epi8(static_cast<char>(problem.zero));
  for (int64_t block = 0; block < problem.blocks; ++block) {
    _mm512_store_si512(panel.starts + block * kPanelColumns, _mm512_setzero_si512());
  }
  BlockCursor cursor = {problem.block, problem.blocks_per_group};
  for (int64_t k = 0; k < depth; k += 64) {
    const int64_t offset = k / 8 * BITS;
    const __mmask64 mask = packed_mask64<BITS>(problem.row_bytes - offset);
    __m512i tile[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const uint8_t* source = weight + smaller(c, count - 1) * problem.row_bytes + offset;
      tile[c] = levels64<BITS, false>(_mm512_maskz_loadu_epi8(mask, source), table);
      _mm_prefetch(source + 16 * problem.row_bytes, _MM_HINT_T1);  // rows are short: nothing else would fetch ahead
    }
    transpose16(tile);
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {  // 16 codes each: never in two blocks
      if (k + 16 * part >= depth) break;
      const __m512i zero_point =
          problem.zero_point != nullptr
              ? _mm512_load_si512(panel.groups.zero_points + cursor.group * kPanelColumns)
              : constant;
      __m512i sum = _mm512_setzero_si512();
      int8_t* target = panel.weights + (k + 16 * part) * kPanelColumns;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        const __m512i values = _mm512_sub_epi8(tile[4 * part + quad], zero_point);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), values);
        _mm512_store_si512(target + quad * 4 * kPanelColumns, values);
      }
      int32_t* start = panel.starts + cursor.block * kPanelColumns;
      _mm512_store_si512(start, _mm512_sub_epi32(_mm512_load_si512(start), sum));
      cursor.next_codes(16);
    }
  }
}

// The same for nibbles, 128 codes at a time: two fields of a byte are transposed together. Every 8 codes of the panel
// are the even ones, then the odd ones.
template <bool LEVELS>
__attribute__((noinline)) void expand_nibbles(const LowBitLinear& problem, int64_t column, int64_t count, Panel panel) {
  const __m512i table = level_table(problem), low = _mm512_set1_epi8(15);
  const uint8_t* weight = problem.weight + column * problem.row_bytes;
  const int64_t depth = problem.blocks * problem.block;
  const __m512i constant = _mm512_set1_epi8(static_cast<char>(problem.zero));
  for (int64_t block = 0; block < problem.blocks; ++block) {
    _mm512_store_si512(panel.starts + block * kPanelColumns, _mm512_setzero_si512());
  }
  BlockCursor cursor = {problem.block, problem.blocks_per_group};
  for (int64_t k = 0; k < depth; k += 128) {
    const __mmask64 mask = lanes64(problem.row_bytes - k / 2);
    __m512i tile[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const uint8_t* source = weight + smaller(c, count - 1) * problem.row_bytes + k / 2;
      tile[c] = _mm512_maskz_loadu_epi8(mask, source);
      _mm_prefetch(source + 16 * problem.row_bytes, _MM_HINT_T1);
    }
    transpose16(tile);
#pragma GCC unroll 8
    for (int part = 0; part < 8; ++part) {  // 16 codes each: never in two blocks
      if (k + 16 * part >= depth) break;
      const __m512i zero_point =
          problem.zero_point != nullptr
              ? _mm512_load_si512(panel.groups.zero_points + cursor.group * kPanelColumns)
              : constant;
      __m512i sum = _mm512_setzero_si512();
      int8_t* target = panel.weights + (k + 16 * part) * kPanelColumns;
#pragma GCC unroll 4
      for (int quad = 0; quad < 4; ++quad) {
        const __m512i packed = tile[2 * part + quad / 2];
        __m512i values = _mm512_and_si512(quad % 2 == 0 ? packed : _mm512_srli_epi16(packed, 4), low);
        if constexpr (LEVELS) values = _mm512_shuffle_epi8(table, values);
        values = _mm512_sub_epi8(values, zero_point);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), values);
        _mm512_store_si512(target + quad * 4 * kPanelColumns, values);
      }
      int32_t* start = panel.starts + cursor.block * kPanelColumns;
      _mm512_store_si512(start, _mm512_sub_epi32(_mm512_load_si512(start), sum));
      cursor.next_codes(16);
    }
  }
}

using Expand = void (*)(const LowBitLinear&, int64_t, int64_t, Panel);

Expand expand_body(const LowBitLinear& problem) {
  switch (problem.bits) {
    case 2: return expand_weights<2>;
    case 3: return expand_weights<3>;
    case 4: return problem.levels != nullptr ? expand_nibbles<true> : expand_nibbles<false>;
    case 5: return expand_weights<5>;
    case 6: return expand_weights<6>;
    default: return expand_weights<8>;
  }
}

// ROWS rows with the 32 columns of the panel: float totals into out[row][32]. A block is `repeats` times QUADS * 4
// codes.
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
      finish<kPanelColumns>(problem, row, count, part, totals);
      row += count;
    }
  }
}

}  // namespace

void lowbit_tile_avx512vnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  if (problem.rows <= kFewRows) return lowbit_few_rows_avx512vnni(problem, rows, columns, scratch);
  many_rows(problem, rows, columns, scratch);
}

// Of every 8 codes the even ones, then the odd ones: the order of a panel of nibbles.
void lowbit_order_row_avx512vnni(const LowBitLinear& problem, uint8_t* codes) {
  if (problem.bits != 4 || problem.rows <= kFewRows) return;
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15));
  for (int64_t k = 0; k < problem.code_stride; k += 64) {
    _mm512_storeu_si512(codes + k, _mm512_shuffle_epi8(_mm512_loadu_si512(codes + k), order));
  }
}

int64_t lowbit_scratch_avx512vnni(const LowBitLinear& problem) {
  const int64_t depth = problem.blocks * problem.block;
  const int64_t panel = (8 * problem.groups + 4 * problem.blocks + depth) * kPanelColumns;
  const int64_t few = lowbit_few_rows_scratch_avx512vnni(problem);
  return panel > few ? panel : few;
}

}  // namespace narrowcast
