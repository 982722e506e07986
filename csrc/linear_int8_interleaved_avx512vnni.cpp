// int8 linear tile on interleaved weights, AVX-512 VNNI: any number of rows runs the same register tile, up to 6 rows
// with 4 panels of 16 columns, and the weights are read once, in order, for every six rows.
//
// The raw int32 sums go through memory to the epilogue: GCC 12 otherwise keeps the accumulators in memory all the time.
#include "linear_int8_avx512.h"

#include <string.h>

#include "interleaved.h"

namespace narrowcast {
namespace {

constexpr int64_t kAhead = 512;  // bytes of each of the next panels that few rows fetch ahead

// Sums of ROWS rows with PANELS panels, `panel_bytes` apart, into out[row][kPanelColumns].
template <int ROWS, int PANELS>
__attribute__((noinline)) void tile_rows(const uint8_t* codes, int64_t stride, const int8_t* panel,
                                         int64_t panel_bytes, int32_t* out) {
  __m512i sums[ROWS][PANELS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) sums[r][p] = _mm512_setzero_si512();
  }
  for (int64_t at = 0; at < panel_bytes; at += 2 * kUnitBytes, codes += 8) {
#pragma GCC unroll 2
    for (int quad = 0; quad < 2; ++quad) {
      __m512i weights[PANELS];
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) {
        const int8_t* source = panel + p * panel_bytes + at + quad * kUnitBytes;
        weights[p] = _mm512_loadu_si512(source);
      }
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        memcpy(&four, codes + r * stride + 4 * quad, 4);
        const __m512i a = _mm512_set1_epi32(four);
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) sums[r][p] = _mm512_dpbusd_epi32(sums[r][p], a, weights[p]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) _mm512_storeu_si512(out + r * kPanelColumns + 16 * p, sums[r][p]);
  }
}

using Kernel = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
template <int PANELS>
constexpr Kernel kKernels[kPanelRows] = {tile_rows<1, PANELS>, tile_rows<2, PANELS>, tile_rows<3, PANELS>,
                                         tile_rows<4, PANELS>, tile_rows<5, PANELS>, tile_rows<6, PANELS>};

const Kernel* kernels_for(int64_t panels) {
  switch (panels) {
    case 1: return kKernels<1>;
    case 2: return kKernels<2>;
    case 3: return kKernels<3>;
    default: return kKernels<4>;
  }
}

// The first lines of the next panels: the processor follows four streams by itself, but takes its time to find them.
void prefetch_starts(const int8_t* panel, int64_t panel_bytes) {
  for (int64_t p = 0; p < 4; ++p) {
    for (int64_t at = 0; at < kAhead; at += 64) _mm_prefetch(panel + p * panel_bytes + at, _MM_HINT_T1);
  }
}

}  // namespace

void int8_interleaved_avx512vnni(const Int8Linear& problem, Range rows, Range columns, void*) {
  const int64_t panel_bytes = Interleaved{0, problem.depth, 8}.panel_bytes();
  alignas(64) int32_t sums[kPanelRows * kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    const Kernel* kernels = kernels_for((part.end - part.begin + 15) / 16);
    const int8_t* panel = problem.weight + column / 16 * panel_bytes;
    const int64_t total = rows.end - rows.begin;
    if (total <= 2) prefetch_starts(panel + 4 * panel_bytes, panel_bytes);
    const int64_t steps = (total + kPanelRows - 1) / kPanelRows;
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      kernels[count - 1](problem.codes + row * problem.code_stride, problem.code_stride, panel, panel_bytes, sums);
      finish(problem, row, count, part, sums);
      row += count;
    }
  }
}

}  // namespace narrowcast
