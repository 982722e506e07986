// A few input rows against stored weights with products of bfloat16 pairs, AVX-512 BF16.
//
// Integers of up to 8 bits are exact in bfloat16, and so is every input that is one; a float32 or float16 input is the
// sum of two bfloat16 numbers, which keeps 16 of its bits (all 11 of float16). 64 bytes of codes are 32 words. Shifting
// all words by the same distance brings one slot of every word to its bottom, where a lookup makes 32 bfloat16 values
// of it; a product instruction then adds the two words of each 32-bit lane. A byte of 8 bits is two nibbles, looked up
// one after the other and multiplied with the same input.
#pragma once

#include "unpack_avx512.h"
#include "weight_only_lanes.h"

namespace narrowcast {
namespace {

constexpr int slots_of(int bits) { return bits == 2 ? 8 : bits == 4 || bits == 8 ? 4 : 2; }

bool covers(const StoredWeight& weight) {
  if (!covers_lanes(weight)) return false;
  if (weight.levels == nullptr) return true;
  if (weight.bits > 4 || weight.levels_stride != 0) return false;
  uint32_t lost = 0;
  for (int field = 0; field < 1 << weight.bits; ++field) lost |= float_to_bits(weight.levels[field]) & 0xffffu;
  return lost == 0;
}

int64_t arranged(const StoredWeight& weight, int parts) {
  const int64_t block = 16 * fields_of(weight.bits), blocks = weight.columns / block;
  return blocks * (block * parts / 2 + 16) + block;
}

// Per block and column of a word: 32 inputs, those of lane l in its two words; then the same of the second parts. Then
// the sums per lane, and the columns behind the last whole block.
void arrange(const StoredWeight& weight, const float* x, int parts, float* out) {
  const int64_t fields = fields_of(weight.bits), half = fields / 2, block = 16 * fields;
  const int64_t blocks = weight.columns / block;
  auto* target = reinterpret_cast<uint16_t*>(out);
  float* sums = out + blocks * block * parts / 2;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(fields)));
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t at = 0; at < blocks; ++at) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t column = 0; column < half; ++column) {
      __m512 first = _mm512_i32gather_ps(index, x + at * block + column, 4);
      __m512 second = _mm512_i32gather_ps(index, x + at * block + column + half, 4);
      for (int part = 0; part < parts; ++part, target += 32) {
        const __m512i low_words = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(first)));
        const __m512i high_words = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(second)));
        const __m512i rounded_first = _mm512_slli_epi32(low_words, 16), rounded_second = _mm512_slli_epi32(high_words, 16);
        _mm512_storeu_si512(target, _mm512_or_si512(_mm512_and_si512(rounded_second, high), low_words));
        const __m512 both = _mm512_add_ps(_mm512_castsi512_ps(rounded_first), _mm512_castsi512_ps(rounded_second));
        sum = _mm512_add_ps(sum, both);
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(rounded_first));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(rounded_second));
      }
    }
    _mm512_storeu_ps(sums + at * 16, sum);
  }
  float* rest = sums + blocks * 16;
  for (int64_t column = blocks * block; column < weight.columns; ++column) *rest++ = x[column];
}

// The lookup tables: 32 words, those of the fields; for 6 bits 64, for 8 bits one of the low and one of the high nibble.
struct WordTables {
  __m512i first, second;

  explicit WordTables(const StoredWeight& weight) {
    alignas(64) uint16_t words[64];
    const int fields = 1 << weight.bits, middle = fields / 2;
    for (int entry = 0; entry < 64; ++entry) {
      int field = entry & (fields - 1);
      float value = static_cast<float>(field - middle);
      if (weight.bits == 8) {
        field = entry & 15;
        // codes of two's complement: the high nibble has the sign; unsigned ones are turned into them
        value = entry < 32 ? static_cast<float>(field) : static_cast<float>(16 * (field < 8 ? field : field - 16));
      } else if (weight.levels != nullptr) {
        value = weight.levels[field];
      }
      words[entry] = static_cast<uint16_t>(float_to_bits(value) >> 16);
    }
    first = _mm512_load_si512(words), second = _mm512_load_si512(words + 32);
  }
};

template <int kBits>
inline __m512i load_words(const uint8_t* row, int64_t row_bytes, int64_t block, __m512i flip) {
  if constexpr (kBits == 2 || kBits == 4) return _mm512_loadu_si512(row + block * 64);
  if constexpr (kBits == 8) return _mm512_xor_si512(_mm512_loadu_si512(row + block * 64), flip);
  return unpack64<kBits>(row, row_bytes, block * 64);
}

template <int kBits, int kSlot>
inline __m512bh slot_values(__m512i words, const WordTables& tables) {
  constexpr int shift = 16 / slots_of(kBits) * kSlot;
  const __m512i index = shift == 0 ? words : _mm512_srli_epi16(words, shift);
  if constexpr (kBits == 6) {
    return reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(tables.first, index, tables.second));
  }
  const bool high_nibble = kBits == 8 && kSlot % 2 == 1;
  return reinterpret_cast<__m512bh>(_mm512_permutexvar_epi16(index, high_nibble ? tables.second : tables.first));
}

template <int kBits, int kRows, int kParts, int kSlot>
inline void add_slots(__m512i words, const WordTables& tables, const char* x, int64_t stride,
                      __m512 (*partial)[2]) {
  const __m512bh value = slot_values<kBits, kSlot>(words, tables);
  constexpr int column = kBits == 8 ? kSlot / 2 : kSlot;
#pragma GCC unroll 4
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const __m512i input = _mm512_loadu_si512(x + row * stride + (column * kParts + part) * 64);
      __m512& chain = partial[row][(kSlot * kParts + part) % 2];  // two chains hide the latency of the products
      chain = _mm512_dpbf16_ps(chain, value, reinterpret_cast<__m512bh>(input));
    }
  }
  if constexpr (kSlot + 1 < slots_of(kBits)) {
    add_slots<kBits, kRows, kParts, kSlot + 1>(words, tables, x, stride, partial);
  }
}

struct BlockRange {
  int64_t begin, end, all;
};

template <int kBits, int kRows, int kParts>
void add_columns(const StoredWeight& weight, const float* x, BlockRange range, int64_t begin, int64_t end, float* sums,
                 int64_t sums_stride) {
  constexpr int64_t fields = fields_of(kBits), block_size = 16 * fields, block_bytes = block_size * kParts * 2;
  const int64_t stride = arranged(weight, kParts), first_sum = range.all * block_size * kParts / 2;
  const LaneScales lanes(weight, block_size, fields);
  const WordTables tables(weight);
  const __m512i flip = _mm512_set1_epi8(weight.is_signed ? 0 : static_cast<char>(0x80));
  const auto* bytes = reinterpret_cast<const char*>(x);
  // what comes next in time: further on in the same memory, or in chunks the same place of the next row
  const int64_t ahead = range.end - range.begin == range.all ? 2048 : 2 * weight.row_bytes;
  for (int64_t column = begin; column < end; ++column) {
    const uint8_t* codes = weight.codes + column * weight.row_bytes;
    const int64_t first = column * weight.scale_stride;
    __m512 total[kRows];
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) total[row] = _mm512_setzero_ps();
    for (int64_t block = range.begin; block < range.end; ++block) {
      __m512 partial[kRows][2];
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) partial[row][0] = partial[row][1] = _mm512_setzero_ps();
      _mm_prefetch(reinterpret_cast<const char*>(codes + block * 2 * fields * kBits + ahead), _MM_HINT_T0);
      const __m512i words = load_words<kBits>(codes, weight.row_bytes, block, flip);
      add_slots<kBits, kRows, kParts, 0>(words, tables, bytes + block * block_bytes, stride * 4, partial);
      if (weight.zero_point != nullptr) {
        const __m512 zero = lanes.zeros(weight, first, block);
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) {
          const __m512 sum = _mm512_loadu_ps(x + row * stride + first_sum + block * 16);
          partial[row][1] = _mm512_fnmadd_ps(zero, sum, partial[row][1]);
        }
      }
      const __m512 scale = lanes.scales(weight, first, block);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        total[row] = _mm512_fmadd_ps(scale, _mm512_add_ps(partial[row][0], partial[row][1]), total[row]);
      }
    }
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) sums[row * sums_stride + column - begin] += _mm512_reduce_add_ps(total[row]);
  }
}

// Four input rows of a chunk of blocks stay in the first-level cache while all columns pass by.
constexpr int64_t kChunkBytes = 16384;

template <int kBits, int kRows, int kParts>
void chunked(const StoredWeight& weight, const float* x, int64_t begin, int64_t end, float* sums) {
  constexpr int64_t block_size = 16 * fields_of(kBits), row_bytes = block_size * kParts * 2 * kRows;
  const int64_t blocks = weight.columns / block_size, stride = arranged(weight, kParts);
  const int64_t chunk = kRows == 1 ? blocks : kChunkBytes / row_bytes;
  for (int64_t first = 0; first < blocks; first += chunk) {
    const BlockRange range = {first, first + chunk < blocks ? first + chunk : blocks, blocks};
    add_columns<kBits, kRows, kParts>(weight, x, range, begin, end, sums, end - begin);
  }
  if (blocks * block_size == weight.columns) return;
  const float* rest = x + blocks * (block_size * kParts / 2 + 16);
  for (int64_t column = begin; column < end; ++column) {
    float row_sums[kRows] = {};
    add_rest(weight, column, blocks * block_size, rest, stride, kRows, row_sums);
    for (int row = 0; row < kRows; ++row) sums[row * (end - begin) + column - begin] += row_sums[row];
  }
}

template <int kBits, int kParts>
void few_rows_of(const StoredWeight& weight, const float* x, int64_t rows, int64_t begin, int64_t end, float* sums) {
  const int64_t stride = arranged(weight, kParts), count = end - begin;
  memset(sums, 0, static_cast<size_t>(rows * count * 4));
  for (; rows >= 4; rows -= 4, x += 4 * stride, sums += 4 * count) {
    chunked<kBits, 4, kParts>(weight, x, begin, end, sums);
  }
  switch (rows) {
    case 1: return chunked<kBits, 1, kParts>(weight, x, begin, end, sums);
    case 2: return chunked<kBits, 2, kParts>(weight, x, begin, end, sums);
    case 3: return chunked<kBits, 3, kParts>(weight, x, begin, end, sums);
    default: return;
  }
}

template <int kParts>
void few_rows_parts(const StoredWeight& weight, const float* x, int64_t rows, int64_t begin, int64_t end, float* sums) {
  switch (weight.bits) {
    case 2: return few_rows_of<2, kParts>(weight, x, rows, begin, end, sums);
    case 3: return few_rows_of<3, kParts>(weight, x, rows, begin, end, sums);
    case 4: return few_rows_of<4, kParts>(weight, x, rows, begin, end, sums);
    case 5: return few_rows_of<5, kParts>(weight, x, rows, begin, end, sums);
    case 6: return few_rows_of<6, kParts>(weight, x, rows, begin, end, sums);
    default: return few_rows_of<8, kParts>(weight, x, rows, begin, end, sums);
  }
}

void few_rows(const StoredWeight& weight, const float* x, int parts, int64_t rows, int64_t begin, int64_t end,
              float* sums) {
  if (parts == 1) {
    few_rows_parts<1>(weight, x, rows, begin, end, sums);
  } else {
    few_rows_parts<2>(weight, x, rows, begin, end, sums);
  }
}

}  // namespace
}  // namespace narrowcast
