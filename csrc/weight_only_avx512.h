// A few input rows against stored weights, expanded in registers; shared by the AVX-512 tiers.
//
// 64 bytes of codes are 16 lanes of 32 bits, and a lane holds `kFields` fields. Shifting all lanes by the same distance
// brings field j of every lane to its bottom, where a lookup among 16 levels, or a conversion, makes 16 floats of it. The
// input is arranged to match: block by block, first the columns that are field 0 of the lanes, then field 1, ...
#pragma once

#include <immintrin.h>

#include "unpack_avx512.h"
#include "weight_only_lanes.h"

namespace narrowcast {
namespace {

bool covers(const StoredWeight& weight) {
  if (!covers_lanes(weight)) return false;
  // learned levels: one table for a whole row
  return weight.levels == nullptr ||
         (weight.bits <= 4 && (weight.levels_stride == 0 || weight.group >= weight.columns));
}

// Arranged blocks, then their sums per lane, then the columns behind the last whole block.
int64_t arranged(const StoredWeight& weight, int) {
  const int64_t block = 16 * fields_of(weight.bits), blocks = weight.columns / block;
  return blocks * (block + 16) + block;
}

void arrange(const StoredWeight& weight, const float* x, int, float* out) {
  const int64_t fields = fields_of(weight.bits), block = 16 * fields, blocks = weight.columns / block;
  float* sums = out + blocks * block;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(fields)));
  for (int64_t at = 0; at < blocks; ++at) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t field = 0; field < fields; ++field) {
      const __m512 values = _mm512_i32gather_ps(index, x + at * block + field, 4);
      _mm512_storeu_ps(out + at * block + field * 16, values);
      sum = _mm512_add_ps(sum, values);
    }
    _mm512_storeu_ps(sums + at * 16, sum);
  }
  float* rest = sums + blocks * 16;
  for (int64_t column = blocks * block; column < weight.columns; ++column) *rest++ = x[column];
}

// 16 lanes that hold the fields of one block, ready for `field_values`.
template <int kBits>
inline __m512i load_fields(const uint8_t* row, int64_t row_bytes, int64_t block, __m512i flip) {
  if constexpr (kBits == 2 || kBits == 4) return _mm512_loadu_si512(row + block * 64);
  if constexpr (kBits == 8) return _mm512_xor_si512(_mm512_loadu_si512(row + block * 64), flip);
  const __m512i fields = unpack64<kBits>(row, row_bytes, block * 64);
  return kBits == 3 ? fields : _mm512_sub_epi8(fields, _mm512_set1_epi8(1 << (kBits - 1)));
}

template <int kBits, int kField>
inline __m512 field_values(__m512i lanes, __m512 table) {
  if constexpr (kBits <= 4) {  // the lookup takes the low four bits; the table repeats where a field has fewer
    constexpr int shift = kBits == 3 ? 8 * kField : kBits * kField;
    return _mm512_permutexvar_ps(shift == 0 ? lanes : _mm512_srli_epi32(lanes, shift), table);
  } else {
    const __m512i raised = kField == 3 ? lanes : _mm512_slli_epi32(lanes, 24 - 8 * kField);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(raised, 24));
  }
}

template <int kBits, int kRows, int kField>
inline void add_fields(__m512i lanes, __m512 table, const float* x, int64_t stride, __m512* partial) {
  const __m512 value = field_values<kBits, kField>(lanes, table);
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
    partial[row] = _mm512_fmadd_ps(value, _mm512_loadu_ps(x + row * stride + 16 * kField), partial[row]);
  }
  if constexpr (kField + 1 < fields_of(kBits)) add_fields<kBits, kRows, kField + 1>(lanes, table, x, stride, partial);
}

inline __m512 level_table(const StoredWeight& weight, int64_t row) {
  alignas(64) float table[16] = {};
  const float* levels = weight.levels != nullptr ? load_levels(weight, row, 0) : nullptr;
  for (int entry = 0; entry < 16 && weight.bits <= 4; ++entry) {
    const int field = entry & ((1 << weight.bits) - 1);
    table[entry] = levels != nullptr ? levels[field] : static_cast<float>(field - (1 << (weight.bits - 1)));
  }
  return _mm512_load_ps(table);
}

template <int kBits, int kRows>
void rows_of_columns(const StoredWeight& weight, const float* x, int64_t begin, int64_t end, float* sums,
                     int64_t sums_stride) {
  constexpr int64_t fields = fields_of(kBits), block_size = 16 * fields;
  const int64_t blocks = weight.columns / block_size, stride = arranged(weight, 1);
  const LaneScales lanes(weight, block_size, fields);
  __m512 table = level_table(weight, begin);
  const __m512i flip = _mm512_set1_epi8(weight.is_signed ? 0 : static_cast<char>(0x80));
  for (int64_t column = begin; column < end; ++column) {
    const uint8_t* codes = weight.codes + column * weight.row_bytes;
    const int64_t first = column * weight.scale_stride;
    if (weight.levels_stride != 0) table = level_table(weight, column);
    __m512 total[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) total[row] = _mm512_setzero_ps();
    for (int64_t block = 0; block < blocks; ++block) {
      __m512 partial[kRows];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) partial[row] = _mm512_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(codes + block * 2 * fields * kBits + 2048), _MM_HINT_T0);
      const __m512i packed = load_fields<kBits>(codes, weight.row_bytes, block, flip);
      add_fields<kBits, kRows, 0>(packed, table, x + block * block_size, stride, partial);
      if (weight.zero_point != nullptr) {
        const __m512 zero = lanes.zeros(weight, first, block);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          const __m512 sum = _mm512_loadu_ps(x + row * stride + blocks * block_size + block * 16);
          partial[row] = _mm512_fnmadd_ps(zero, sum, partial[row]);
        }
      }
      const __m512 scale = lanes.scales(weight, first, block);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) total[row] = _mm512_fmadd_ps(scale, partial[row], total[row]);
    }
    float row_sums[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) row_sums[row] = _mm512_reduce_add_ps(total[row]);
    if (blocks * block_size < weight.columns) {
      add_rest(weight, column, blocks * block_size, x + blocks * (block_size + 16), stride, kRows, row_sums);
    }
    for (int row = 0; row < kRows; ++row) sums[row * sums_stride + column - begin] = row_sums[row];
  }
}

template <int kBits>
void few_rows_of(const StoredWeight& weight, const float* x, int64_t rows, int64_t begin, int64_t end, float* sums) {
  const int64_t stride = arranged(weight, 1), count = end - begin;
  // a few weight rows at a time stay in the first-level cache for all input rows
  for (int64_t column = begin; column < end; column += 4) {
    const int64_t last = column + 4 < end ? column + 4 : end;
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) {
      rows_of_columns<kBits, 4>(weight, x + row * stride, column, last, sums + row * count + column - begin, count);
    }
    float* target = sums + row * count + column - begin;
    switch (rows - row) {
      case 1: rows_of_columns<kBits, 1>(weight, x + row * stride, column, last, target, count); break;
      case 2: rows_of_columns<kBits, 2>(weight, x + row * stride, column, last, target, count); break;
      case 3: rows_of_columns<kBits, 3>(weight, x + row * stride, column, last, target, count); break;
      default: break;
    }
  }
}

void few_rows(const StoredWeight& weight, const float* x, int, int64_t rows, int64_t begin, int64_t end, float* sums) {
  switch (weight.bits) {
    case 2: return few_rows_of<2>(weight, x, rows, begin, end, sums);
    case 3: return few_rows_of<3>(weight, x, rows, begin, end, sums);
    case 4: return few_rows_of<4>(weight, x, rows, begin, end, sums);
    case 5: return few_rows_of<5>(weight, x, rows, begin, end, sums);
    case 6: return few_rows_of<6>(weight, x, rows, begin, end, sums);
    default: return few_rows_of<8>(weight, x, rows, begin, end, sums);
  }
}

}  // namespace
}  // namespace narrowcast
