// Packed codes to bytes, AVX-512 without VBMI: 64 codes of BITS bits, a little-endian stream as in core/packing.py.
// Every 16 codes take 2 * BITS bytes, so one vpermw puts each 128-bit lane's codes at its start.
#pragma once

#include <immintrin.h>
#include <stdint.h>

namespace narrowcast {
namespace {

// Mask of the 8 * BITS bytes of 64 codes, cut where `bytes` (what is left of the row) ends.
template <int BITS>
inline __mmask64 packed_mask64(int64_t bytes) {
  constexpr uint64_t kAll = BITS == 8 ? ~0ull : (1ull << (8 * BITS % 64)) - 1;
  return bytes >= 8 * BITS ? kAll : bytes <= 0 ? 0 : (1ull << bytes) - 1;
}

// Word i of each lane: the two bytes with codes 2 i and 2 i + 1, shifted down to bit 0.
template <int BITS>
inline __m512i pairs_in_words(__m512i packed) {
  alignas(64) uint16_t words[32];
  alignas(64) uint8_t bytes[64];
  alignas(64) uint16_t shifts[32];
#pragma GCC unroll 32
  for (int word = 0; word < 32; ++word) {
    const int bit = word % 8 * 2 * BITS, source = word / 8 * BITS + word % 8;
    words[word] = static_cast<uint16_t>(source);
    bytes[2 * word] = static_cast<uint8_t>(bit / 8);
    bytes[2 * word + 1] = static_cast<uint8_t>(bit / 8 + 1);
    shifts[word] = static_cast<uint16_t>(bit % 8);
  }
  const __m512i lanes = _mm512_permutexvar_epi16(_mm512_load_si512(words), packed);
  return _mm512_srlv_epi16(_mm512_shuffle_epi8(lanes, _mm512_load_si512(bytes)), _mm512_load_si512(shifts));
}

// 64 unsigned fields, one per byte, from the first 8 * BITS bytes of a vector.
template <int BITS>
inline __m512i spread64(__m512i packed) {
  static_assert(BITS >= 2 && BITS <= 8 && BITS != 7);
  if constexpr (BITS == 8) return packed;
  const __m512i mask = _mm512_set1_epi8((1 << BITS) - 1);
  if constexpr (BITS == 2) {
    const __m512i fours = _mm512_cvtepu8_epi32(_mm512_castsi512_si128(packed));
    const __m512i halves = _mm512_or_si512(fours, _mm512_slli_epi32(fours, 12));
    return _mm512_and_si512(_mm512_or_si512(halves, _mm512_slli_epi32(halves, 6)), mask);
  }
  if constexpr (BITS == 4) {
    const __m512i pairs = _mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed));
    return _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi16(pairs, 4)), mask);
  }
  const __m512i pairs = pairs_in_words<BITS>(packed);
  const __m512i high = _mm512_slli_epi16(pairs, 8 - BITS);
  // 0xca: low byte of each word from `pairs`, high byte from `high`
  const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi16(255), pairs, high, 0xca);
  return _mm512_and_si512(both, mask);
}

// Codes first .. first + 63 of a packed row as unsigned fields; `first` is a multiple of 64. What lies behind the end
// of the row reads as zero.
template <int BITS>
inline __m512i unpack64(const uint8_t* row, int64_t row_bytes, int64_t first) {
  const int64_t offset = first / 8 * BITS;
  return spread64<BITS>(_mm512_maskz_loadu_epi8(packed_mask64<BITS>(row_bytes - offset), row + offset));
}

}  // namespace
}  // namespace narrowcast
