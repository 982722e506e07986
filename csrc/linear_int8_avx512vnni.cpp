// int8 linear tile, AVX-512 VNNI: vpdpbusd with the activation codes as the unsigned operand.
//
// Few rows: 16 accumulators along K on the stored weight rows, summed by a 16 x 16 transposition. Many rows: the
// columns of the tile are copied once into a [depth / 4][64][4] panel, and a 6 x 64 register tile runs over all rows.
// The raw int32 sums go through memory to the epilogue: GCC 12 otherwise keeps the accumulators in memory all the time.
#include "linear_int8_avx512.h"

#include <string.h>

#include "transpose_avx512.h"

namespace narrowcast {
namespace {

// ROWS x (16 / ROWS) sums from the stored rows: lane row * COLUMNS + column. `row` and `weight` point at the rows.
template <int ROWS>
inline __m512i dot_tile(const uint8_t* const* row, const int8_t* const* weight, int64_t depth) {
  constexpr int COLUMNS = 16 / ROWS;
  __m512i sums[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) sums[i] = _mm512_setzero_si512();
  int64_t k = 0;
  for (; k + 64 <= depth; k += 64) {
    __m512i codes[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) codes[r] = _mm512_loadu_si512(row[r] + k);
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512i values = _mm512_loadu_si512(weight[c] + k);
      // the columns after these: a row is too short for the processor to fetch the next one by itself
      _mm_prefetch(weight[c] + k + COLUMNS * depth, _MM_HINT_T1);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r * COLUMNS + c] = _mm512_dpbusd_epi32(sums[r * COLUMNS + c], codes[r], values);
      }
    }
  }
  if (k < depth) {
    const __mmask64 mask = lanes64(depth - k);
#pragma GCC unroll 16
    for (int c = 0; c < COLUMNS; ++c) {
      const __m512i values = _mm512_maskz_loadu_epi8(mask, weight[c] + k);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; ++r) {
        sums[r * COLUMNS + c] = _mm512_dpbusd_epi32(sums[r * COLUMNS + c], _mm512_loadu_si512(row[r] + k), values);
      }
    }
  }
  return sum_lanes(sums);
}

// Sums of ROWS rows with the columns [columns.begin, columns.end) into out[row][kPanelColumns].
template <int ROWS>
void dot_rows(const Int8Linear& problem, int64_t first_row, int64_t row_count, Range columns, int32_t* out) {
  constexpr int COLUMNS = 16 / ROWS;
  const uint8_t* row[ROWS];
  for (int r = 0; r < ROWS; ++r) {  // rows that do not exist repeat the last one
    row[r] = problem.codes + (first_row + smaller(r, row_count - 1)) * problem.code_stride;
  }
  for (int64_t column = columns.begin; column < columns.end; column += COLUMNS) {
    const int8_t* weight[COLUMNS];
    for (int c = 0; c < COLUMNS; ++c) {
      weight[c] = problem.weight + smaller(column + c, columns.end - 1) * problem.depth;
    }
    const __m512i sums = dot_tile<ROWS>(row, weight, problem.depth);
    alignas(64) int32_t lanes[16];
    _mm512_store_si512(lanes, sums);
    for (int64_t r = 0; r < row_count; ++r) {
      memcpy(out + r * kPanelColumns + (column - columns.begin), lanes + r * COLUMNS, 4 * COLUMNS);
    }
  }
}

// Copies up to 64 stored weight rows into the panel [round_up(depth, 4) / 4][64][4]; zeros where there is no weight.
void pack_panel(const Int8Linear& problem, Range columns, int8_t* panel) {
  const int64_t quads = (problem.depth + 3) / 4;
  for (int64_t first = 0; first < kPanelColumns; first += 16) {
    const int64_t count = columns.end - columns.begin - first;
    const int8_t* weight = problem.weight + (columns.begin + first) * problem.depth;
    for (int64_t k = 0; k < problem.depth; k += 64) {
      const __mmask64 mask = lanes64(problem.depth - k);
      __m512i tile[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) {
        tile[c] = c < count ? _mm512_maskz_loadu_epi8(mask, weight + c * problem.depth + k) : _mm512_setzero_si512();
        _mm_prefetch(weight + (c + 16) * problem.depth + k, _MM_HINT_T1);
      }
      transpose16(tile);
      int8_t* target = panel + k * kPanelColumns + first * 4;
      const int64_t steps = smaller(16, quads - k / 4);
      if (steps == 16) {
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) _mm512_store_si512(target + q * 4 * kPanelColumns, tile[q]);
      } else {
#pragma GCC unroll 16
        for (int q = 0; q < 16; ++q) {
          if (q < steps) _mm512_store_si512(target + q * 4 * kPanelColumns, tile[q]);
        }
      }
    }
  }
}

// Sums of ROWS rows with the 64 columns of the panel into out[row][64].
template <int ROWS>
__attribute__((noinline)) void panel_rows(const uint8_t* codes, int64_t stride, const int8_t* panel, int64_t quads,
                                          int32_t* out) {
  __m512i sums[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_setzero_si512();
  }
  for (int64_t quad = 0; quad < quads; ++quad, panel += 4 * kPanelColumns, codes += 4) {
    const __m512i w0 = _mm512_load_si512(panel), w1 = _mm512_load_si512(panel + 64);
    const __m512i w2 = _mm512_load_si512(panel + 128), w3 = _mm512_load_si512(panel + 192);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      memcpy(&four, codes + r * stride, 4);
      const __m512i a = _mm512_set1_epi32(four);
      sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], a, w0);
      sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], a, w1);
      sums[r][2] = _mm512_dpbusd_epi32(sums[r][2], a, w2);
      sums[r][3] = _mm512_dpbusd_epi32(sums[r][3], a, w3);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_store_si512(out + r * kPanelColumns + 16 * c, sums[r][c]);
  }
}

void few_rows(const Int8Linear& problem, Range rows, Range columns) {
  alignas(64) int32_t sums[4 * kPanelColumns + 16];
  int64_t row = rows.begin;
  while (row < rows.end) {
    const int64_t left = rows.end - row;
    const int64_t count = left >= 3 ? smaller(left, 4) : left;
    if (count == 1) dot_rows<1>(problem, row, count, columns, sums);
    if (count == 2) dot_rows<2>(problem, row, count, columns, sums);
    if (count >= 3) dot_rows<4>(problem, row, count, columns, sums);
    finish(problem, row, count, columns, sums);
    row += count;
  }
}

using PanelKernel = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
constexpr PanelKernel kPanelKernels[kPanelRows] = {panel_rows<1>, panel_rows<2>, panel_rows<3>,
                                                   panel_rows<4>, panel_rows<5>, panel_rows<6>};

void many_rows(const Int8Linear& problem, Range rows, Range columns, int8_t* panel) {
  alignas(64) int32_t sums[kPanelRows * kPanelColumns];
  pack_panel(problem, columns, panel);
  const int64_t quads = (problem.depth + 3) / 4;
  const int64_t total = rows.end - rows.begin, steps = (total + kPanelRows - 1) / kPanelRows;
  int64_t row = rows.begin;
  for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
    const int64_t count = total / steps + (step < total % steps ? 1 : 0);
    kPanelKernels[count - 1](problem.codes + row * problem.code_stride, problem.code_stride, panel, quads, sums);
    finish(problem, row, count, columns, sums);
    row += count;
  }
}

// Measured on Zen 4: copying the panel costs depth / 19 rows' worth of what `few_rows` spends on summing lanes.
bool use_panel(int64_t rows, int64_t depth) { return rows >= 4 && rows * 19 >= depth; }

}  // namespace

void int8_tile_avx512vnni(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  const bool panel = use_panel(rows.end - rows.begin, problem.depth);
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    if (panel) {
      many_rows(problem, rows, part, static_cast<int8_t*>(scratch));
    } else {
      few_rows(problem, rows, part);
    }
  }
}

int64_t int8_scratch_avx512vnni(int64_t depth) { return (depth + 3) / 4 * 4 * kPanelColumns; }

}  // namespace narrowcast
