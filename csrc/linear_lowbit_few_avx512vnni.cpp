// Low-bit linear, AVX-512 VNNI, one or two rows: 16 stored weight rows at a time along K, expanded in registers. The
// levels are the unsigned operand of vpdpbusd; sums over blocks come from a transposition.
//
// The time goes into reading the weights. A row is too short for the processor to find out that it is read in order, so
// the rows of the next 16 columns are prefetched meanwhile.
#include "linear_lowbit_avx512.h"

namespace narrowcast {
namespace {

// What the columns share: signed codes in the order in which the levels come, sums over blocks (times the zero point
// where all blocks have the same).
struct Row {
  const int8_t* codes;
  const int32_t* code_sums;
  const float* code_scales;
};

// Whether 128 codes are taken at a time, the even ones and the odd ones apart: nibbles need no spreading then.
inline bool by_nibbles(const LowBitLinear& problem) { return problem.bits == 4 && problem.block >= 32; }

// The float term of one block of 16 columns.
inline __m512 block_term(const LowBitLinear& problem, __m512i sum, Groups groups, const BlockCursor& cursor,
                         const Row& row) {
  const int64_t group = cursor.group * 16, block = cursor.block;
  __m512i correction = _mm512_set1_epi32(row.code_sums[block]);
  if (problem.zero_point != nullptr) {
    const __m512i zero_point = _mm512_srli_epi32(_mm512_load_si512(groups.zero_points + group), 24);
    correction = problem.block <= 128  // a sum of 128 codes fits in 16 bits: vpmaddwd multiplies the low halves
                     ? _mm512_madd_epi16(zero_point, _mm512_and_si512(correction, _mm512_set1_epi32(0xffff)))
                     : _mm512_mullo_epi32(zero_point, correction);
  }
  const __m512 product = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction));
  return _mm512_mul_ps(_mm512_mul_ps(product, _mm512_load_ps(groups.scales + group)),
                       _mm512_set1_ps(row.code_scales[block]));
}

// Adds the terms of `count` (1, 2 or 4) blocks from lanes that hold a quarter of their codes each.
inline __m512 add_blocks(const LowBitLinear& problem, const __m512i* sums, int64_t count, Groups groups,
                         BlockCursor* cursor, const Row& row, __m512 total) {
  __m512i quads[4], lanes[4];
  sum_quads(sums, quads);
  transpose_lanes(quads, lanes);
  if (count <= 2) lanes[0] = _mm512_add_epi32(lanes[0], lanes[1]), lanes[1] = _mm512_add_epi32(lanes[2], lanes[3]);
  if (count == 1) lanes[0] = _mm512_add_epi32(lanes[0], lanes[1]);
  for (int64_t part = 0; part < count && cursor->block < problem.blocks; ++part, cursor->next_block()) {
    total = _mm512_add_ps(total, block_term(problem, lanes[part], groups, *cursor, row));
  }
  return total;
}

template <bool LEVELS>
inline __m512i nibble_levels(__m512i nibbles, __m512i table) {
  const __m512i fields = _mm512_and_si512(nibbles, _mm512_set1_epi8(15));
  if constexpr (LEVELS) return _mm512_shuffle_epi8(table, fields);
  return fields;
}

// One row with 16 columns straight from the stored rows: their totals. NIBBLES: see by_nibbles.
template <int BITS, bool LEVELS, bool NIBBLES>
__attribute__((noinline)) __m512 dot_columns(const LowBitLinear& problem, const Row& row, const uint8_t* weight,
                                             int64_t step, Groups groups) {
  constexpr int64_t kSpan = NIBBLES ? 128 : 64, kBytes = kSpan / 8 * BITS;
  const __m512i table = level_table(problem);
  const int64_t depth = problem.blocks * problem.block, ahead = 16 * problem.row_bytes;
  const int64_t count = problem.block < kSpan ? kSpan / problem.block : 1;
  BlockCursor cursor = {problem.block, problem.blocks_per_group};
  __m512 total = _mm512_setzero_ps();
  for (int64_t k = 0; k < depth;) {
    __m512i sums[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) sums[c] = _mm512_setzero_si512();
    const int64_t end = k + (problem.block > kSpan ? problem.block : kSpan);
    for (; k < end && k < depth; k += kSpan) {
      const int64_t offset = k / 8 * BITS;
      const __mmask64 mask = NIBBLES ? lanes64(problem.row_bytes - offset)
                                     : packed_mask64<BITS>(problem.row_bytes - offset);
      const __m512i codes = _mm512_loadu_si512(row.codes + k);
      const __m512i odd_codes = NIBBLES ? _mm512_loadu_si512(row.codes + k + 64) : codes;
      const uint8_t* source = weight + offset;
#pragma GCC unroll 16
      for (int c = 0; c < 16; ++c, source += step) {
        const __m512i packed = _mm512_maskz_loadu_epi8(mask, source);
        if (kBytes >= 64 || k % (64 / kBytes * kSpan) == 0) _mm_prefetch(source + ahead, _MM_HINT_T1);
        if constexpr (NIBBLES) {
          sums[c] = _mm512_dpbusd_epi32(sums[c], nibble_levels<LEVELS>(packed, table), codes);
          sums[c] = _mm512_dpbusd_epi32(sums[c], nibble_levels<LEVELS>(_mm512_srli_epi16(packed, 4), table), odd_codes);
        } else {
          sums[c] = _mm512_dpbusd_epi32(sums[c], levels64<BITS, LEVELS>(packed, table), codes);
        }
      }
    }
    total = add_blocks(problem, sums, count, groups, &cursor, row, total);
  }
  return total;
}

using DotColumns = __m512 (*)(const LowBitLinear&, const Row&, const uint8_t*, int64_t, Groups);

DotColumns dot_body(const LowBitLinear& problem) {
  const bool nibbles = by_nibbles(problem);
  switch (problem.bits) {
    case 2: return dot_columns<2, false, false>;
    case 3: return dot_columns<3, false, false>;
    case 4:
      if (problem.levels != nullptr) return nibbles ? dot_columns<4, true, true> : dot_columns<4, true, false>;
      return nibbles ? dot_columns<4, false, true> : dot_columns<4, false, false>;
    case 5: return dot_columns<5, false, false>;
    case 6: return dot_columns<6, false, false>;
    default: return dot_columns<8, false, false>;
  }
}

// Sums of the signed codes of each block of one row, times the zero point where there is one for all.
void sum_codes(const LowBitLinear& problem, const uint8_t* codes, int32_t* sums) {
  const int32_t factor = problem.zero_point != nullptr ? 1 : problem.zero;
  for (int64_t block = 0; block < problem.blocks; ++block, codes += problem.block) {
    __m512i sum = _mm512_setzero_si512();
    for (int64_t k = 0; k < problem.block; k += 64) {
      const __m512i part = _mm512_maskz_loadu_epi8(lanes64(problem.block - k), codes + k);
      sum = _mm512_dpbusd_epi32(sum, part, _mm512_set1_epi8(1));
    }
    sums[block] = factor * (_mm512_reduce_add_epi32(sum) - static_cast<int32_t>(128 * problem.block));
  }
}

// Signed codes; of every 128 the even ones first and then the odd ones where the body wants that. Zeros behind.
void order_codes(const LowBitLinear& problem, const uint8_t* codes, int8_t* ordered) {
  const __m512i flip = _mm512_set1_epi8(-128), low = _mm512_set1_epi16(255);
  for (int64_t k = 0; k < problem.code_stride; k += 128) {
    const __m512i first = _mm512_xor_si512(_mm512_loadu_si512(codes + k), flip);
    const __mmask64 mask = lanes64(problem.code_stride - k - 64);
    const __m512i second = _mm512_mask_xor_epi32(_mm512_setzero_si512(), mask != 0 ? 0xffff : 0,
                                                 _mm512_maskz_loadu_epi8(mask, codes + k + 64), flip);
    if (!by_nibbles(problem)) {
      _mm512_store_si512(ordered + k, first), _mm512_store_si512(ordered + k + 64, second);
      continue;
    }
    const __m512i evens = _mm512_packus_epi16(_mm512_and_si512(first, low), _mm512_and_si512(second, low));
    const __m512i odds = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
    // packus takes 8 bytes of each in turn, lane by lane
    const __m512i lanes = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_store_si512(ordered + k, _mm512_permutexvar_epi64(lanes, evens));
    _mm512_store_si512(ordered + k + 64, _mm512_permutexvar_epi64(lanes, odds));
  }
}

inline int64_t ordered_bytes(const LowBitLinear& problem) { return (problem.code_stride + 127) / 128 * 128; }

}  // namespace

int64_t lowbit_few_rows_scratch_avx512vnni(const LowBitLinear& problem) {
  return 2 * ordered_bytes(problem) + 8 * problem.groups * 16 + 2 * 4 * problem.blocks;
}

void lowbit_few_rows_avx512vnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const DotColumns dot = dot_body(problem);
  auto* ordered = static_cast<int8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(ordered + 2 * ordered_bytes(problem));
  auto* zero_points = reinterpret_cast<int32_t*>(scales + problem.groups * 16);
  const Groups groups = {scales, zero_points};
  int32_t* code_sums = zero_points + problem.groups * 16;
  Row row[2];
  const int64_t row_count = rows.end - rows.begin;
  for (int64_t r = 0; r < row_count; ++r) {
    const uint8_t* codes = problem.codes + (rows.begin + r) * problem.code_stride;
    row[r] = {ordered + r * ordered_bytes(problem), code_sums + r * problem.blocks,
              problem.code_scales + (rows.begin + r) * problem.blocks};
    sum_codes(problem, codes, code_sums + r * problem.blocks);
    order_codes(problem, codes, ordered + r * ordered_bytes(problem));
  }
  alignas(64) float totals[kPanelColumns];
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    // The last tile reaches back where there are 16 columns; with fewer, all read the first.
    const int64_t all = columns.end - columns.begin;
    const int64_t start = all < 16 ? column : smaller(column, columns.end - 16);
    const int64_t count = smaller(16, columns.end - start), step = count == 16 ? problem.row_bytes : 0;
    expand_groups<16>(problem, start, count, groups);
    for (int64_t r = 0; r < row_count; ++r) {
      const uint8_t* weight = problem.weight + start * problem.row_bytes;
      if (count == 16) {
        _mm512_store_ps(totals, dot(problem, row[r], weight, step, groups));
      } else {
        for (int64_t c = 0; c < count; ++c) {  // 16 times the same column: one lane counts
          alignas(64) float lanes[16];
          _mm512_store_ps(lanes, dot(problem, row[r], weight + c * problem.row_bytes, 0, groups));
          totals[c] = lanes[c];
        }
      }
      finish<kPanelColumns>(problem, rows.begin + r, 1, {start, start + count}, totals);
    }
  }
}

}  // namespace narrowcast
