// int8 linear tile on interleaved weights, 256 bits: one panel of 16 columns at a time, a few rows.
//
// With vpdpbusd that is all. Without it the bytes of a unit are split into their even and their odd ones, sign-extended
// to int16 where they lie: vpmaddwd with the even and the odd codes of a quad then leaves every column's sum in its own
// lane. Exact for every code and weight.
#pragma once

#include "linear_int8_body_256.h"

#include "interleaved.h"

namespace narrowcast {
namespace {

#if NARROWCAST_DOT_256
constexpr int kTileRows = 6;

struct TileCodes {
  const uint8_t* first;
  int64_t stride;
};

inline TileCodes tile_codes(const Int8Linear& problem, int64_t row, int64_t, void*) {
  return {problem.codes + row * problem.code_stride, problem.code_stride};
}

template <int ROWS>
inline void add_quad(const int8_t* unit, const TileCodes& codes, int64_t quad, __m256i (*sums)[2]) {
  const __m256i w0 = load_weight(unit), w1 = load_weight(unit + 32);
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    int32_t four;
    memcpy(&four, codes.first + r * codes.stride + 4 * quad, 4);
    const __m256i a = _mm256_set1_epi32(four);
    sums[r][0] = multiply_add(sums[r][0], a, w0);
    sums[r][1] = multiply_add(sums[r][1], a, w1);
  }
}
#else
constexpr int kTileRows = 4;

// Two int32 words per quad of every row: its even codes as int16 and, `odd` words further, its odd ones.
struct TileCodes {
  const int32_t* first;
  int64_t stride, odd;
};

// Widens the codes of `count` rows into `scratch`; what lies behind a row meets weights of zero.
TileCodes tile_codes(const Int8Linear& problem, int64_t row, int64_t count, void* scratch) {
  const int64_t odd = Interleaved{0, problem.depth, 8}.chunks() * 8;
  auto* words = static_cast<int32_t*>(scratch);
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* codes = problem.codes + (row + r) * problem.code_stride;
    int32_t* even = words + r * 2 * odd;
    for (int64_t word = 0; word < odd; word += 8) {
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 4 * word));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + word), _mm256_and_si256(bytes, _mm256_set1_epi16(255)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(even + odd + word), _mm256_srli_epi16(bytes, 8));
    }
  }
  return {words, 2 * odd, odd};
}

template <int ROWS>
inline void add_quad(const int8_t* unit, const TileCodes& codes, int64_t quad, __m256i (*sums)[2]) {
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(unit + 32 * half));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), odd = _mm256_srai_epi16(bytes, 8);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      const int32_t* words = codes.first + r * codes.stride + quad;
      sums[r][half] = multiply_add(sums[r][half], _mm256_set1_epi32(words[0]), even);
      sums[r][half] = multiply_add(sums[r][half], _mm256_set1_epi32(words[codes.odd]), odd);
    }
  }
}
#endif

// Sums of ROWS rows with one panel into out[row][16].
template <int ROWS>
__attribute__((noinline)) void interleaved_rows(const TileCodes& codes, const int8_t* panel, int64_t panel_bytes,
                                                int32_t* out) {
  __m256i sums[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
  for (int64_t at = 0; at < panel_bytes; at += kUnitBytes) {
    if (ROWS <= 2) _mm_prefetch(panel + at + 2048, _MM_HINT_T0);
    add_quad<ROWS>(panel + at, codes, at / kUnitBytes, sums);
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns), sums[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * kPanelColumns + 8), sums[r][1]);
  }
}

void run_rows(int64_t count, const TileCodes& codes, const int8_t* panel, int64_t panel_bytes, int32_t* out) {
  switch (count) {
    case 1: return interleaved_rows<1>(codes, panel, panel_bytes, out);
    case 2: return interleaved_rows<2>(codes, panel, panel_bytes, out);
    case 3: return interleaved_rows<3>(codes, panel, panel_bytes, out);
    case 4: return interleaved_rows<4>(codes, panel, panel_bytes, out);
#if NARROWCAST_DOT_256
    case 5: return interleaved_rows<5>(codes, panel, panel_bytes, out);
    default: return interleaved_rows<6>(codes, panel, panel_bytes, out);
#endif
  }
}

void int8_interleaved(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  const int64_t panel_bytes = Interleaved{0, problem.depth, 8}.panel_bytes();
  int32_t sums[kTileRows * kPanelColumns];
  const int64_t total = rows.end - rows.begin, steps = (total + kTileRows - 1) / kTileRows;
  // 64 columns at a time stay in cache for all rows, and the codes of a row are widened once for them
  for (int64_t first = columns.begin; first < columns.end; first += kColumnTile) {
    const int64_t last = smaller(first + kColumnTile, columns.end);
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      const TileCodes codes = tile_codes(problem, row, count, scratch);
      for (int64_t column = first; column < last; column += kPanelColumns) {
        run_rows(count, codes, problem.weight + column / 16 * panel_bytes, panel_bytes, sums);
        finish(problem, row, count, {column, smaller(column + kPanelColumns, last)}, sums, kPanelColumns);
      }
      row += count;
    }
  }
}

}  // namespace
}  // namespace narrowcast
