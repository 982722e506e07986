// Low-bit linear tile on interleaved weights, AVX-512 VNNI.
//
// A quad of levels of 16 columns is the unsigned operand of vpdpbusd, a quad of signed activation codes, broadcast from
// memory, the other one. The int32 sum of a block starts at minus the zero point times the sum of its codes. Fields are
// brought out of their bytes again for every few rows: that takes ports which vpdpbusd does not use.
#include "linear_lowbit_avx512.h"

#include "interleaved.h"

namespace narrowcast {
namespace {

constexpr int64_t kWidePanels = 4;    // panels of a register tile of up to kWideRows rows
constexpr int64_t kNarrowPanels = 2;  // and of one of up to kTileRows
constexpr int kWideRows = 2;
constexpr int kTileRows = 6;
constexpr int64_t kAhead = 512;  // bytes of each of the next panels that few rows fetch ahead

// sum += levels . codes, four codes of one row for all columns; the broadcast is part of the instruction.
inline void add_products(__m512i& sum, __m512i levels, const int8_t* codes) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(levels), "m"(*reinterpret_cast<const int32_t*>(codes)));
}

inline __m512i load_unit(const uint8_t* units, int unit) { return _mm512_loadu_si512(units + unit * kUnitBytes); }

template <int SHIFT>
inline __m512i shifted(__m512i value) {
  if constexpr (SHIFT > 0) return _mm512_srli_epi16(value, SHIFT);
  if constexpr (SHIFT < 0) return _mm512_slli_epi16(value, -SHIFT);
  return value;
}

// Levels of quad QUAD of a chunk.
template <int BITS, bool LEVELS, int QUAD>
inline __m512i quad_levels(const uint8_t* units, __m512i table) {
  if constexpr (BITS == 8) return _mm512_xor_si512(load_unit(units, QUAD), _mm512_set1_epi8(-128));
  constexpr int kLow = BITS >= 4 ? 4 : 2, kHigh = BITS - kLow, kPerUnit = 8 / kLow;
  const __m512i low = shifted<QUAD % kPerUnit * kLow>(load_unit(units, QUAD / kPerUnit));
  const __m512i low_mask = _mm512_set1_epi8((1 << kLow) - 1);
  if constexpr (LEVELS) return _mm512_shuffle_epi8(table, _mm512_and_si512(low, low_mask));
  if constexpr (kHigh == 0) {
    return _mm512_and_si512(low, low_mask);
  } else {
    constexpr int kHighPerUnit = 8 / kHigh;
    const __m512i high = shifted<QUAD % kHighPerUnit * kHigh - kLow>(load_unit(units, 8 / kPerUnit + QUAD / kHighPerUnit));
    // 0xd8: from `low` where its mask has ones, else from `high`; the bits above the field go
    const __m512i both = _mm512_ternarylogic_epi32(high, low, low_mask, 0xd8);
    return _mm512_and_si512(both, _mm512_set1_epi8((1 << BITS) - 1));
  }
}

// What a register tile reads and where its float totals go.
struct Tile {
  const int8_t* codes;          // first row, signed
  const int32_t* code_sums;     // [row][blocks]
  const float* code_scales;     // [row][blocks]
  const uint8_t* panel;         // first panel
  int64_t panel_bytes;
  int64_t first_group;          // index of the first panel's first scale, in units of 16
  float* totals;                // [row][kTotalColumns]
};
constexpr int64_t kTotalColumns = 64;

template <int ROWS, int PANELS, int BITS, bool LEVELS, int QUAD>
inline void add_quads(__m512i (&sums)[ROWS][PANELS], const uint8_t* const* units, const int8_t* const* codes,
                      __m512i table) {
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p) {
    const __m512i levels = quad_levels<BITS, LEVELS, QUAD>(units[p], table);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) add_products(sums[r][p], levels, codes[r] + 4 * QUAD);
  }
  if constexpr (QUAD < 7) add_quads<ROWS, PANELS, BITS, LEVELS, QUAD + 1>(sums, units, codes, table);
}

// COUNT pointers `step` apart. What they are is hidden from the compiler, which would otherwise keep one pointer for
// every row and quad, most of them on the stack.
template <int COUNT, class Type>
inline void spread_pointers(const Type* first, int64_t step, const Type** pointers) {
#pragma GCC unroll 6
  for (int i = 0; i < COUNT; ++i) {
    pointers[i] = first + i * step;
    asm("" : "+r"(pointers[i]));
  }
}

template <bool LEVELS>
inline __m512 load_scale(const LowBitLinear& problem, int64_t index) {
  const __m512 scale = problem.scale_is_half
                           ? _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(problem.scale) + index))
                           : _mm512_loadu_ps(static_cast<const float*>(problem.scale) + 16 * index);
  return LEVELS ? _mm512_mul_ps(scale, _mm512_set1_ps(problem.level_scale)) : scale;
}

// Where the sums of a block start: code_sums already holds minus the sum, times the zero point where that is one.
inline __m512i start_of(const LowBitLinear& problem, const int32_t* code_sum, int64_t group) {
  const __m512i sum = _mm512_set1_epi32(*code_sum);
  if (problem.zero_point == nullptr) return sum;
  const __m128i fields = _mm_loadu_si128(reinterpret_cast<const __m128i*>(problem.zero_point) + group);
  const __m512i zero_point =
      _mm512_and_si512(_mm512_cvtepu8_epi32(fields), _mm512_set1_epi32((1 << problem.bits) - 1));
  // a sum of 128 codes fits in 16 bits: vpmaddwd multiplies the low halves, and the high one of zero_point is 0
  return problem.block <= 128 ? _mm512_madd_epi16(zero_point, sum) : _mm512_mullo_epi32(zero_point, sum);
}

template <int ROWS, int PANELS, int BITS, bool LEVELS>
__attribute__((noinline)) void tile_rows(const LowBitLinear& problem, const Tile& tile) {
  const __m512i table = level_table(problem);
  const int64_t stride = problem.code_stride, block_chunks = problem.block / kChunk, blocks = problem.blocks;
  const int64_t panel_bytes = tile.panel_bytes, groups = problem.groups;
  const uint8_t* units = tile.panel;
  const int8_t* codes = tile.codes;
  int64_t group = tile.first_group, left_in_group = problem.blocks_per_group;
  int64_t chunks_left = (problem.depth + kChunk - 1) / kChunk;
  __m512 totals[ROWS][PANELS];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) totals[r][p] = _mm512_setzero_ps();
  }
  for (int64_t block = 0; block < blocks; ++block) {
    __m512i sums[ROWS][PANELS];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) {
        sums[r][p] = start_of(problem, tile.code_sums + r * blocks + block, group + p * groups);
      }
    }
    const int64_t chunks = smaller(block_chunks, chunks_left);
    chunks_left -= chunks;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, units += BITS * kUnitBytes, codes += kChunk) {
      const uint8_t* panels[PANELS];
      const int8_t* rows[ROWS];
      spread_pointers<PANELS>(units, panel_bytes, panels);
      spread_pointers<ROWS>(codes, stride, rows);
      add_quads<ROWS, PANELS, BITS, LEVELS, 0>(sums, panels, rows, table);
    }
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const __m512 scale = load_scale<LEVELS>(problem, group + p * groups);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const __m512 code_scale = _mm512_set1_ps(tile.code_scales[r * blocks + block]);
        const __m512 term = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][p]), scale), code_scale);
        totals[r][p] = _mm512_add_ps(totals[r][p], term);
      }
    }
    if (--left_in_group == 0) ++group, left_in_group = problem.blocks_per_group;
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) _mm512_storeu_ps(tile.totals + r * kTotalColumns + 16 * p, totals[r][p]);
  }
}

using Kernel = void (*)(const LowBitLinear&, const Tile&);

// One panel at a time where fewer than the tile's are left.
template <int BITS, bool LEVELS>
constexpr Kernel kSingle[kTileRows] = {
    tile_rows<1, 1, BITS, LEVELS>, tile_rows<2, 1, BITS, LEVELS>, tile_rows<3, 1, BITS, LEVELS>,
    tile_rows<4, 1, BITS, LEVELS>, tile_rows<5, 1, BITS, LEVELS>, tile_rows<6, 1, BITS, LEVELS>};
template <int BITS, bool LEVELS>
constexpr Kernel kFull[kTileRows] = {
    tile_rows<1, kWidePanels, BITS, LEVELS>,   tile_rows<2, kWidePanels, BITS, LEVELS>,
    tile_rows<3, kNarrowPanels, BITS, LEVELS>, tile_rows<4, kNarrowPanels, BITS, LEVELS>,
    tile_rows<5, kNarrowPanels, BITS, LEVELS>, tile_rows<6, kNarrowPanels, BITS, LEVELS>};

struct Kernels {
  const Kernel *full, *single;
};

template <int BITS, bool LEVELS = false>
constexpr Kernels kKernels = {kFull<BITS, LEVELS>, kSingle<BITS, LEVELS>};

Kernels find_kernels(const LowBitLinear& problem) {
  switch (problem.bits) {
    case 2: return kKernels<2>;
    case 3: return kKernels<3>;
    case 4: return problem.levels != nullptr ? kKernels<4, true> : kKernels<4>;
    case 5: return kKernels<5>;
    case 6: return kKernels<6>;
    default: return kKernels<8>;
  }
}

// The first lines of the next panels: the processor follows four streams by itself, but takes its time to find them.
void prefetch_starts(const uint8_t* panel, int64_t panel_bytes) {
  for (int64_t p = 0; p < kWidePanels; ++p) {
    for (int64_t at = 0; at < kAhead; at += 64) _mm_prefetch(panel + p * panel_bytes + at, _MM_HINT_T1);
  }
}

void interleaved_tile(const LowBitLinear& problem, Range rows, Range columns, void*) {
  const Kernels kernels = find_kernels(problem);
  const int64_t panel_bytes = Interleaved{0, problem.depth, problem.bits}.panel_bytes();
  const int64_t total = rows.end - rows.begin, steps = (total + kTileRows - 1) / kTileRows;
  alignas(64) float totals[kTileRows * kTotalColumns];
  const int64_t wide = 16 * (total <= kWideRows ? kWidePanels : kNarrowPanels);
  for (int64_t column = columns.begin; column < columns.end;) {
    const bool full = columns.end - column > wide - 16;
    const Range part = {column, smaller(column + (full ? wide : 16), columns.end)};
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 16 = 6 + 5 + 5
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      const Tile tile = {reinterpret_cast<const int8_t*>(problem.codes) + row * problem.code_stride,
                         problem.code_sums + row * problem.blocks,
                         problem.code_scales + row * problem.blocks,
                         problem.weight + column / 16 * panel_bytes,
                         panel_bytes,
                         column / 16 * problem.groups,
                         totals};
      if (total <= kWideRows) prefetch_starts(tile.panel + wide / 16 * panel_bytes, panel_bytes);
      (full ? kernels.full : kernels.single)[count - 1](problem, tile);
      finish<kTotalColumns>(problem, row, count, part, totals);
      row += count;
    }
    column = part.end;
  }
}

int64_t no_scratch(const LowBitLinear&) { return 0; }

}  // namespace

const InterleavedKernels lowbit_interleaved_avx512vnni = {lowbit_codes_avx512vnni, interleaved_tile, no_scratch};

}  // namespace narrowcast
