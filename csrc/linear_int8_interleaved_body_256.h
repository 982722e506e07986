// int8 linear tile on interleaved weights, 256 bits with vpdpbusd: one panel of 16 columns, up to 6 rows. Without that
// instruction codes and weights have to be widened, and a panel of widened weights is what the stored layout gives too.
#pragma once

#include "linear_int8_body_256.h"

#include "interleaved.h"

namespace narrowcast {
namespace {

// Sums of ROWS rows with one panel into out[row][16].
template <int ROWS>
__attribute__((noinline)) void interleaved_rows(const uint8_t* codes, int64_t stride, const int8_t* panel,
                                                int64_t panel_bytes, int32_t* out) {
  __m256i sums[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t at = 0; at < panel_bytes; at += kUnitBytes, codes += 4) {
    const __m256i w0 = load_weight(panel + at), w1 = load_weight(panel + at + 32);
    if (ROWS <= 2) _mm_prefetch(panel + at + 2048, _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      memcpy(&four, codes + r * stride, 4);
      const __m256i a = _mm256_set1_epi32(four);
      sums[r][0] = multiply_add(sums[r][0], a, w0);
      sums[r][1] = multiply_add(sums[r][1], a, w1);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns), sums[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns + 8), sums[r][1]);
  }
}

using InterleavedKernel = void (*)(const uint8_t*, int64_t, const int8_t*, int64_t, int32_t*);
constexpr InterleavedKernel kInterleavedKernels[kPanelRows] = {interleaved_rows<1>, interleaved_rows<2>,
                                                               interleaved_rows<3>, interleaved_rows<4>,
                                                               interleaved_rows<5>, interleaved_rows<6>};

void int8_interleaved(const Int8Linear& problem, Range rows, Range columns) {
  const int64_t panel_bytes = Interleaved{0, problem.depth, 8}.panel_bytes();
  int32_t sums[kPanelRows * kPanelColumns];
  const int64_t total = rows.end - rows.begin, steps = (total + kPanelRows - 1) / kPanelRows;
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    const int8_t* panel = problem.weight + column / 16 * panel_bytes;
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      kInterleavedKernels[count - 1](problem.codes + row * problem.code_stride, problem.code_stride, panel,
                                     panel_bytes, sums);
      finish(problem, row, count, part, sums, kPanelColumns);
      row += count;
    }
  }
}

}  // namespace
}  // namespace narrowcast
