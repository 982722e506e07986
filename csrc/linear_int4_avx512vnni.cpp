// int4 linear tile, AVX-512 VNNI: the nibbles are the unsigned operand of vpdpbusd, the activation codes the signed one.
//
// One or two rows: 16 stored weight rows at a time along K, one int32 sum per block of 32 and column by a transposition.
// More rows: 32 columns are unpacked once into a [blocks][8][32][4] panel of nibbles, and a 6 x 32 register tile runs
// over all rows. Blocks are added in ascending order in float32 without contraction, as in the reference.
#include "linear.h"

#include <string.h>

#include "simd_avx512.h"
#include "transpose_avx512.h"

namespace narrowcast {
namespace {

constexpr int64_t kPanelColumns = 32;
constexpr int64_t kPanelRows = 6;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// Scales and zero points of up to 16 columns as [blocks][WIDTH] float32 and int32, from column `first` of the tile on.
struct Groups {
  float* scales;
  int32_t* zero_points;
};

template <int WIDTH>
void expand_one_group(const Int4Linear& problem, int64_t column, int64_t count, int64_t group, Groups groups) {
  alignas(64) uint16_t halves[16] = {};
  alignas(64) int32_t zeros[16] = {};
  for (int64_t c = 0; c < count; ++c) {
    halves[c] = problem.scale[(column + c) * problem.groups + group];
    if (problem.zero_point != nullptr) zeros[c] = problem.zero_point[(column + c) * problem.groups + group];
  }
  const __m512 scales = _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(halves)));
  const int64_t blocks = (problem.depth + 31) / 32, begin = group * problem.blocks_per_group;
  const int64_t end = smaller(begin + problem.blocks_per_group, blocks);
  for (int64_t block = begin; block < end; ++block) {
    _mm512_store_ps(groups.scales + block * WIDTH, scales);
    if (problem.zero_point != nullptr) {
      _mm512_store_si512(groups.zero_points + block * WIDTH, _mm512_load_si512(zeros));
    }
  }
}

// Four groups of one block each at once: gathers 4 x 16 bits per column.
template <int WIDTH>
void expand_four_groups(const Int4Linear& problem, int64_t column, int64_t count, int64_t group, Groups groups) {
  const __m512i lanes = _mm512_min_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                         _mm512_set1_epi32(static_cast<int>(count - 1)));
  const __m512i stride = _mm512_set1_epi64(problem.groups);
  const int64_t start = column * problem.groups + group;
  const __m512i low_index = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(_mm512_castsi512_si256(lanes)), stride);
  const __m512i high_index = _mm512_mullo_epi64(_mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(lanes, 1)), stride);
  const __m512i low = _mm512_i64gather_epi64(low_index, problem.scale + start, 2);
  const __m512i high = _mm512_i64gather_epi64(high_index, problem.scale + start, 2);
  alignas(64) static const uint16_t kFirst[32] = {0, 4, 8,  12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60,
                                                  1, 5, 9,  13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 53, 57, 61};
  const __m512i first = _mm512_load_si512(kFirst);
  const __m512i pair01 = _mm512_permutex2var_epi16(low, first, high);
  const __m512i pair23 = _mm512_permutex2var_epi16(low, _mm512_add_epi16(first, _mm512_set1_epi16(2)), high);
  float* scales = groups.scales + group * WIDTH;
  _mm512_store_ps(scales, _mm512_cvtph_ps(_mm512_castsi512_si256(pair01)));
  _mm512_store_ps(scales + WIDTH, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pair01, 1)));
  _mm512_store_ps(scales + 2 * WIDTH, _mm512_cvtph_ps(_mm512_castsi512_si256(pair23)));
  _mm512_store_ps(scales + 3 * WIDTH, _mm512_cvtph_ps(_mm512_extracti64x4_epi64(pair23, 1)));
  if (problem.zero_point == nullptr) return;
  const __m256i low_bytes = _mm512_i64gather_epi32(low_index, problem.zero_point + start, 1);
  const __m256i high_bytes = _mm512_i64gather_epi32(high_index, problem.zero_point + start, 1);
  const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(low_bytes), high_bytes, 1);
  int32_t* zeros = groups.zero_points + group * WIDTH;
  const __m512i byte = _mm512_set1_epi32(255);
  _mm512_store_si512(zeros, _mm512_and_si512(bytes, byte));
  _mm512_store_si512(zeros + WIDTH, _mm512_and_si512(_mm512_srli_epi32(bytes, 8), byte));
  _mm512_store_si512(zeros + 2 * WIDTH, _mm512_and_si512(_mm512_srli_epi32(bytes, 16), byte));
  _mm512_store_si512(zeros + 3 * WIDTH, _mm512_srli_epi32(bytes, 24));
}

template <int WIDTH>
void expand_groups(const Int4Linear& problem, int64_t column, int64_t count, Groups groups) {
  int64_t group = 0;
  if (problem.blocks_per_group == 1) {
    for (; group + 4 <= problem.groups; group += 4) {
      expand_four_groups<WIDTH>(problem, column, count, group, groups);
    }
  }
  for (; group < problem.groups; ++group) expand_one_group<WIDTH>(problem, column, count, group, groups);
}

inline __m512i low_nibbles(__m512i bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline __m512i high_nibbles(__m512i bytes) { return low_nibbles(_mm512_srli_epi16(bytes, 4)); }

// The float term of one block: float(sum - zero_point * code_sum) * (code_scale * scale).
inline __m512 block_term(__m512i sum, __m512i zero_point, int32_t code_sum, float code_scale, __m512 scale) {
  // |code_sum| <= 32 * 127 and the zero point fit in 16 bits, so that vpmaddwd multiplies the low halves exactly.
  const __m512i correction = _mm512_madd_epi16(zero_point, _mm512_set1_epi32(code_sum & 0xffff));
  return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction)),
                       _mm512_mul_ps(_mm512_set1_ps(code_scale), scale));
}

// One row with up to 16 columns straight from the stored rows.
void dot_row(const Int4Linear& problem, int64_t row, int64_t column, int64_t count, Groups groups) {
  const int64_t row_bytes = (problem.depth + 1) / 2, blocks = (problem.depth + 31) / 32;
  const uint8_t* weight[16];
  for (int64_t c = 0; c < 16; ++c) weight[c] = problem.weight + (column + smaller(c, count - 1)) * row_bytes;
  const int8_t* codes = problem.codes + row * problem.code_stride;
  const float* code_scales = problem.code_scales + row * problem.block_stride;
  const int32_t* code_sums = problem.code_sums + row * problem.block_stride;
  __m512 total = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; block += 4) {
    const __m512i first = _mm512_loadu_si512(codes + 32 * block), second = _mm512_loadu_si512(codes + 32 * block + 64);
    const __m512i evens = _mm512_shuffle_i32x4(first, second, 0x88), odds = _mm512_shuffle_i32x4(first, second, 0xdd);
    const __mmask64 mask = lanes64(row_bytes - 16 * block);
    __m512i sums[16], quads[4], lanes[4];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, weight[c] + 16 * block);
      sums[c] = _mm512_dpbusd_epi32(_mm512_setzero_si512(), low_nibbles(bytes), evens);
      sums[c] = _mm512_dpbusd_epi32(sums[c], high_nibbles(bytes), odds);
    }
    sum_quads(sums, quads);
    transpose_lanes(quads, lanes);
    for (int64_t part = 0; part < smaller(4, blocks - block); ++part) {
      const __m512i zero_point = problem.zero_point != nullptr
                                     ? _mm512_load_si512(groups.zero_points + 16 * (block + part))
                                     : _mm512_set1_epi32(8);
      total = _mm512_add_ps(total, block_term(lanes[part], zero_point, code_sums[block + part],
                                              code_scales[block + part],
                                              _mm512_load_ps(groups.scales + 16 * (block + part))));
    }
  }
  const __mmask16 mask = lanes16(count);
  if (problem.bias != nullptr) total = _mm512_add_ps(total, _mm512_maskz_loadu_ps(mask, problem.bias + column));
  store16(problem.out, problem.out_type, row * problem.out_stride + column, mask, total);
}

// Unpacks up to 32 stored weight rows into the panel [blocks][8][32][4]: four even quads, then four odd ones.
void unpack_panel(const Int4Linear& problem, int64_t column, int64_t count, uint8_t* panel) {
  const int64_t row_bytes = (problem.depth + 1) / 2, blocks = (problem.depth + 31) / 32;
  for (int64_t first = 0; first < kPanelColumns; first += 16) {
    const uint8_t* weight = problem.weight + (column + first) * row_bytes;
    for (int64_t block = 0; block < blocks; block += 4) {
      const __mmask64 mask = lanes64(row_bytes - 16 * block);
      __m512i tile[16];
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c) {
        tile[c] = first + c < count ? _mm512_maskz_loadu_epi8(mask, weight + c * row_bytes + 16 * block)
                                    : _mm512_setzero_si512();
      }
      transpose16(tile);
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        if (block + part >= blocks) break;
        uint8_t* target = panel + ((block + part) * 8 * kPanelColumns + first) * 4;
#pragma GCC unroll 4
        for (int quad = 0; quad < 4; ++quad) {
          _mm512_store_si512(target + quad * 4 * kPanelColumns, low_nibbles(tile[4 * part + quad]));
          _mm512_store_si512(target + (4 + quad) * 4 * kPanelColumns, high_nibbles(tile[4 * part + quad]));
        }
      }
    }
  }
}

// ROWS rows with the 32 columns of the panel: float totals into out[row][32].
template <int ROWS, bool ASYMMETRIC>
__attribute__((noinline)) void panel_rows(const Int4Linear& problem, int64_t row, const uint8_t* panel, Groups groups,
                                          float* out) {
  const int64_t blocks = (problem.depth + 31) / 32, stride = problem.code_stride, block_stride = problem.block_stride;
  const int8_t* codes = problem.codes + row * stride;
  const float* code_scales = problem.code_scales + row * block_stride;
  const int32_t* code_sums = problem.code_sums + row * block_stride;
  __m512 totals[ROWS][2];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) totals[r][0] = totals[r][1] = _mm512_setzero_ps();
  for (int64_t block = 0; block < blocks; ++block, panel += 8 * 4 * kPanelColumns, codes += 32) {
    __m512i sums[ROWS][2];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const int32_t start = ASYMMETRIC ? 0 : -8 * code_sums[r * block_stride + block];
      sums[r][0] = sums[r][1] = _mm512_set1_epi32(start);
    }
#pragma GCC unroll 8
    for (int quad = 0; quad < 8; ++quad) {
      const __m512i w0 = _mm512_load_si512(panel + quad * 128), w1 = _mm512_load_si512(panel + quad * 128 + 64);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        int32_t four;
        memcpy(&four, codes + r * stride + 4 * quad, 4);
        const __m512i a = _mm512_set1_epi32(four);
        sums[r][0] = _mm512_dpbusd_epi32(sums[r][0], w0, a);
        sums[r][1] = _mm512_dpbusd_epi32(sums[r][1], w1, a);
      }
    }
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
      const __m512 scale = _mm512_load_ps(groups.scales + block * kPanelColumns + 16 * c);
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        if constexpr (ASYMMETRIC) {
          const __m512i zero_point = _mm512_load_si512(groups.zero_points + block * kPanelColumns + 16 * c);
          const __m512i code_sum = _mm512_set1_epi32(code_sums[r * block_stride + block] & 0xffff);
          sums[r][c] = _mm512_sub_epi32(sums[r][c], _mm512_madd_epi16(zero_point, code_sum));
        }
        const __m512 step = _mm512_mul_ps(_mm512_set1_ps(code_scales[r * block_stride + block]), scale);
        totals[r][c] = _mm512_add_ps(totals[r][c], _mm512_mul_ps(_mm512_cvtepi32_ps(sums[r][c]), step));
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
    _mm512_store_ps(out + r * kPanelColumns, totals[r][0]);
    _mm512_store_ps(out + r * kPanelColumns + 16, totals[r][1]);
  }
}

void finish(const Int4Linear& problem, int64_t first_row, int64_t row_count, Range columns, const float* totals) {
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const __mmask16 mask = lanes16(columns.end - column);
    const __m512 bias =
        problem.bias != nullptr ? _mm512_maskz_loadu_ps(mask, problem.bias + column) : _mm512_setzero_ps();
    for (int64_t r = 0; r < row_count; ++r) {
      __m512 value = _mm512_load_ps(totals + r * kPanelColumns + (column - columns.begin));
      if (problem.bias != nullptr) value = _mm512_add_ps(value, bias);
      store16(problem.out, problem.out_type, (first_row + r) * problem.out_stride + column, mask, value);
    }
  }
}

using PanelKernel = void (*)(const Int4Linear&, int64_t, const uint8_t*, Groups, float*);
constexpr PanelKernel kSymmetric[kPanelRows] = {panel_rows<1, false>, panel_rows<2, false>, panel_rows<3, false>,
                                                panel_rows<4, false>, panel_rows<5, false>, panel_rows<6, false>};
constexpr PanelKernel kAsymmetric[kPanelRows] = {panel_rows<1, true>, panel_rows<2, true>, panel_rows<3, true>,
                                                 panel_rows<4, true>, panel_rows<5, true>, panel_rows<6, true>};

// One panel of up to 32 columns with its scales and zero points.
struct Panel {
  Range columns;
  Groups groups;
  uint8_t* nibbles;
};

constexpr int64_t kPanels = kColumnTile / kPanelColumns;

// Bytes of one panel: scales and zero points [blocks][32], nibbles [blocks][8][32][4].
inline int64_t panel_bytes(int64_t blocks) { return blocks * (2 * 4 + 8 * 4) * kPanelColumns; }

Panel make_panel(const Int4Linear& problem, Range columns, char* memory) {
  const int64_t blocks = (problem.depth + 31) / 32, count = columns.end - columns.begin;
  auto* scales = reinterpret_cast<float*>(memory);
  auto* zero_points = reinterpret_cast<int32_t*>(scales + blocks * kPanelColumns);
  const Panel panel = {columns, {scales, zero_points}, reinterpret_cast<uint8_t*>(zero_points + blocks * kPanelColumns)};
  for (int64_t first = 0; first < count; first += 16) {
    expand_groups<kPanelColumns>(problem, columns.begin + first, smaller(16, count - first),
                                 {scales + first, zero_points + first});
  }
  unpack_panel(problem, columns.begin, count, panel.nibbles);
  return panel;
}

// Up to 64 columns: the second panel finds the codes of its rows in the nearest cache.
void many_rows(const Int4Linear& problem, Range rows, Range columns, char* scratch) {
  alignas(64) float totals[kPanelRows * kPanelColumns];
  const int64_t bytes = panel_bytes((problem.depth + 31) / 32);
  Panel panels[kPanels];
  int64_t count = 0;
  for (int64_t column = columns.begin; column < columns.end; column += kPanelColumns, ++count) {
    const Range part = {column, smaller(column + kPanelColumns, columns.end)};
    panels[count] = make_panel(problem, part, scratch + count * bytes);
  }
  const PanelKernel* kernels = problem.zero_point != nullptr ? kAsymmetric : kSymmetric;
  const int64_t total = rows.end - rows.begin, steps = (total + kPanelRows - 1) / kPanelRows;
  int64_t row = rows.begin;
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t length = total / steps + (step < total % steps ? 1 : 0);
    for (int64_t index = 0; index < count; ++index) {
      const Panel& panel = panels[index];
      kernels[length - 1](problem, row, panel.nibbles, panel.groups, totals);
      finish(problem, row, length, panel.columns, totals);
    }
    row += length;
  }
}

}  // namespace

void int4_tile_avx512vnni(const Int4Linear& problem, Range rows, Range columns, void* scratch) {
  if (rows.end - rows.begin > 2) {
    for (int64_t column = columns.begin; column < columns.end; column += kColumnTile) {
      many_rows(problem, rows, {column, smaller(column + kColumnTile, columns.end)}, static_cast<char*>(scratch));
    }
    return;
  }
  auto* scales = static_cast<float*>(scratch);
  const Groups groups = {scales, reinterpret_cast<int32_t*>(scales + (problem.depth + 31) / 32 * 16)};
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const int64_t count = smaller(16, columns.end - column);
    expand_groups<16>(problem, column, count, groups);
    for (int64_t row = rows.begin; row < rows.end; ++row) dot_row(problem, row, column, count, groups);
  }
}

int64_t int4_scratch_avx512vnni(int64_t depth) { return kPanels * panel_bytes((depth + 31) / 32); }

}  // namespace narrowcast
