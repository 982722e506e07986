// Packed codes to bytes, AVX2: 32 codes of BITS bits, a little-endian stream as in core/packing.py. Every 16 codes take
// 2 * BITS bytes: one 128-bit lane each.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace narrowcast {
namespace {

// 16 codes' bytes at the start of each lane; lanes are read in full, so the caller has 16 bytes there.
template <int BITS>
inline __m256i load_lanes32(const uint8_t* packed) {
  return _mm256_set_m128i(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 2 * BITS)),
                          _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
}

template <int BITS>
inline __m256i spread_lanes32(__m256i lanes) {
  static_assert(BITS >= 2 && BITS <= 8 && BITS != 7);
  if constexpr (BITS == 8) return lanes;
  // Codes 2 i and 2 i + 1 of a lane to word i, moved up by a multiplication (there is no variable 16-bit shift) so that
  // they begin at bit kTop of the word.
  constexpr int kTop = BITS == 4 || BITS == 6 ? 4 : 6;
  alignas(32) uint8_t bytes[32];
  alignas(32) uint16_t factors[16];
#pragma GCC unroll 16
  for (int word = 0; word < 16; ++word) {
    const int bit = word % 8 * 2 * BITS;
    bytes[2 * word] = static_cast<uint8_t>(bit / 8);
    bytes[2 * word + 1] = static_cast<uint8_t>(bit / 8 + 1);
    factors[word] = static_cast<uint16_t>(1 << (kTop - bit % 8));
  }
  const __m256i pairs = _mm256_shuffle_epi8(lanes, _mm256_load_si256(reinterpret_cast<const __m256i*>(bytes)));
  const __m256i raised = _mm256_mullo_epi16(pairs, _mm256_load_si256(reinterpret_cast<const __m256i*>(factors)));
  const __m256i low = _mm256_and_si256(_mm256_srli_epi16(raised, kTop), _mm256_set1_epi16((1 << BITS) - 1));
  // the second code begins at bit kTop + BITS and belongs at bit 8
  constexpr int kShift = kTop + BITS - 8;
  const __m256i moved = kShift >= 0 ? _mm256_srli_epi16(raised, kShift >= 0 ? kShift : 0)
                                    : _mm256_slli_epi16(raised, kShift < 0 ? -kShift : 0);
  return _mm256_or_si256(low, _mm256_and_si256(moved, _mm256_set1_epi16(((1 << BITS) - 1) << 8)));
}

// Codes first .. first + 31 of a packed row as unsigned fields, one per byte; `first` is a multiple of 32. What lies
// behind the end of the row reads as zero.
template <int BITS>
inline __m256i unpack32(const uint8_t* row, int64_t row_bytes, int64_t first) {
  const int64_t offset = first / 8 * BITS, left = row_bytes - offset;
  if constexpr (BITS == 4) {  // a byte to a word, its high nibble to the word's high byte
    if (left >= 16) {
      const __m256i pairs = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + offset)));
      return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    }
  }
  if constexpr (BITS == 2) {  // a byte to a dword, two fields and then one to each byte
    if (left >= 8) {
      const __m256i fours = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(row + offset)));
      const __m256i halves = _mm256_or_si256(fours, _mm256_slli_epi32(fours, 12));
      return _mm256_and_si256(_mm256_or_si256(halves, _mm256_slli_epi32(halves, 6)), _mm256_set1_epi8(3));
    }
  }
  if (left >= 2 * BITS + 16) return spread_lanes32<BITS>(load_lanes32<BITS>(row + offset));
  uint8_t padded[32] = {};
  if (left > 0) memcpy(padded, row + offset, static_cast<size_t>(left < 4 * BITS ? left : 4 * BITS));
  return spread_lanes32<BITS>(load_lanes32<BITS>(padded));
}

}  // namespace
}  // namespace narrowcast
