// AVX2 vector operations: 8 lanes; the bodies in *_body.h are written on these names. Compiled for AVX-VNNI, or for its
// instructions in AVX-512's encoding, the dot product is one instruction.
#pragma once

#include <stdint.h>

#include "dot_256.h"

#define NC_INLINE static inline __attribute__((always_inline))

namespace narrowcast {
namespace {

constexpr int kLanes = 8;
constexpr bool kSignedCodes = false;
constexpr int kMaxVectors = 1;
using Float = __m256;
using Int = __m256i;
#if NARROWCAST_DOT_256
constexpr int kTileRows = 6;
using Bytes = __m256i;
#else
constexpr int kTileRows = 4;
// vpmaddubsw saturates (2 * 255 * 127 > 32767), so bytes are widened to their even and odd 16-bit halves: exact.
struct Bytes {
  __m256i even, odd;
};
#endif
using Weights = Bytes;

NC_INLINE __m256i lane_mask(int64_t count) {
  const __m256i order = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count > 8 ? 8 : static_cast<int>(count)), order);
}

NC_INLINE Float load(const float* p) { return _mm256_loadu_ps(p); }
NC_INLINE Float load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, lane_mask(n)); }
NC_INLINE void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
NC_INLINE void store_part(float* p, int64_t n, Float v) { _mm256_maskstore_ps(p, lane_mask(n), v); }
NC_INLINE Float spread(float v) { return _mm256_set1_ps(v); }
NC_INLINE Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
NC_INLINE Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
NC_INLINE Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
NC_INLINE Float divide(Float a, Float b) { return _mm256_div_ps(a, b); }
// x * 0 + seen: a value that is not finite leaves a NaN in `seen`.
NC_INLINE Float watch(Float seen, Float v) { return _mm256_fmadd_ps(v, _mm256_setzero_ps(), seen); }
NC_INLINE bool any_nan(Float v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)) != 0; }
NC_INLINE Float at_most(Float v, Float high) { return _mm256_min_ps(v, high); }
// The bound is returned for a NaN: the caller reports the NaN, the code stays in range.
NC_INLINE Float clamp(Float v, Float low, Float high) { return _mm256_min_ps(_mm256_max_ps(v, low), high); }
NC_INLINE Int to_int(Float v) { return _mm256_cvtps_epi32(v); }
NC_INLINE Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
NC_INLINE Int float_bits(Float v) { return _mm256_castps_si256(v); }
NC_INLINE Float bits_float(Int v) { return _mm256_castsi256_ps(v); }
NC_INLINE Float select_less(Float a, Float b, Float yes, Float no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}

NC_INLINE Int load_int(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NC_INLINE Int load_int_part(const int32_t* p, int64_t n) { return _mm256_maskload_epi32(p, lane_mask(n)); }
NC_INLINE void store_int(int32_t* p, Int v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
NC_INLINE Int spread_int(int32_t v) { return _mm256_set1_epi32(v); }
NC_INLINE Int add_int(Int a, Int b) { return _mm256_add_epi32(a, b); }
NC_INLINE Int subtract_int(Int a, Int b) { return _mm256_sub_epi32(a, b); }
NC_INLINE Int multiply_int(Int a, Int b) { return _mm256_mullo_epi32(a, b); }
NC_INLINE Int and_int(Int a, Int b) { return _mm256_and_si256(a, b); }
NC_INLINE Int or_int(Int a, Int b) { return _mm256_or_si256(a, b); }
NC_INLINE Int max_unsigned(Int a, Int b) { return _mm256_max_epu32(a, b); }
template <int kBits>
NC_INLINE Int shift_left(Int v) { return _mm256_slli_epi32(v, kBits); }
NC_INLINE uint32_t largest_unsigned(Int v) {
  uint32_t lanes[8];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), v);
  uint32_t best = lanes[0];
  for (int i = 1; i < 8; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// Four vectors of integers <= 255 - offset to bytes with the offset added, saturated at 0; per 128-bit part, four
// bytes of each vector.
NC_INLINE __m256i pack_bytes(const Int v[4], int32_t offset) {
  const __m256i plus = _mm256_set1_epi16(static_cast<int16_t>(offset));
  const __m256i low = _mm256_adds_epi16(_mm256_packs_epi32(v[0], v[1]), plus);
  return _mm256_packus_epi16(low, _mm256_adds_epi16(_mm256_packs_epi32(v[2], v[3]), plus));
}
// Lane x = byte x of the four vectors.
NC_INLINE Int pack_lanes(const Int v[4], int32_t offset) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm256_shuffle_epi8(pack_bytes(v, offset), _mm256_broadcastsi128_si256(order));
}
// The bytes of the four vectors one after the other.
NC_INLINE void store_packed(uint8_t* p, const Int v[4], int32_t offset) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permutevar8x32_epi32(pack_bytes(v, offset), order));
}

// The bytes of four vectors one after the other, saturated.
using Packed = __m256i;
NC_INLINE Packed pack_pixels(const Int v[4]) {
  return _mm256_permutevar8x32_epi32(pack_bytes(v, 0), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
NC_INLINE Packed at_least(Packed a, Packed b) { return _mm256_max_epu8(a, b); }
// Each vector's bytes, `step` bytes apart.
NC_INLINE void store_pixels(uint8_t* p, int64_t step, Packed v) {
  const __m128i low = _mm256_castsi256_si128(v), high = _mm256_extracti128_si256(v, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + step), _mm_unpackhi_epi64(low, low));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 2 * step), high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p + 3 * step), _mm_unpackhi_epi64(high, high));
}

// The low byte of each lane.
NC_INLINE __m128i low_bytes(Int v) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  return _mm_packus_epi16(words, words);
}
NC_INLINE void store_low_bytes(uint8_t* p, Int v) { _mm_storel_epi64(reinterpret_cast<__m128i*>(p), low_bytes(v)); }
NC_INLINE void store_low_bytes_part(uint8_t* p, int64_t n, Int v) {
  uint8_t bytes[16];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), low_bytes(v));
  for (int64_t i = 0; i < n; ++i) p[i] = bytes[i];
}
NC_INLINE Int load_signed_bytes(const int8_t* p) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}

NC_INLINE Int zero_int() { return _mm256_setzero_si256(); }
// What a sum starts from besides 0; see conv_vector_neon.h.
NC_INLINE Int start_sum(Int sum, const Weights&) { return sum; }
#if NARROWCAST_DOT_256
NC_INLINE Bytes spread_bytes(const uint8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm256_set1_epi32(word);
}
NC_INLINE Bytes load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NC_INLINE Weights load_weights(const int8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
NC_INLINE Int dot(Int sum, const Bytes& a, const Weights& w) { return dot_bytes(sum, a, w); }
#else
NC_INLINE Bytes split_bytes(__m256i v) {
  return {_mm256_and_si256(v, _mm256_set1_epi16(0xff)), _mm256_srli_epi16(v, 8)};
}
NC_INLINE Bytes spread_bytes(const uint8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return split_bytes(_mm256_set1_epi32(word));
}
NC_INLINE Bytes load_bytes(const uint8_t* p) {
  return split_bytes(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
NC_INLINE Weights load_weights(const int8_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
}
NC_INLINE Int dot(Int sum, const Bytes& a, const Weights& w) {
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a.even, w.even));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(a.odd, w.odd));
}
#endif

// quad[c] lane x = word c of pixel x; pixel x receives words 0..3 as 16 consecutive bytes.
NC_INLINE void store_four_words(uint8_t* p, int64_t stride, int64_t count, const Int quad[4]) {
  const __m256i a = _mm256_unpacklo_epi32(quad[0], quad[1]), b = _mm256_unpackhi_epi32(quad[0], quad[1]);
  const __m256i c = _mm256_unpacklo_epi32(quad[2], quad[3]), d = _mm256_unpackhi_epi32(quad[2], quad[3]);
  const __m256i pixels[4] = {_mm256_unpacklo_epi64(a, c), _mm256_unpackhi_epi64(a, c), _mm256_unpacklo_epi64(b, d),
                             _mm256_unpackhi_epi64(b, d)};
  alignas(32) uint8_t all[4][32];
  for (int i = 0; i < 4; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(all[i]), pixels[i]);
  for (int64_t x = 0; x < count; ++x) __builtin_memcpy(p + x * stride, all[x % 4] + x / 4 * 16, 16);
}

NC_INLINE void transpose(Float rows[8]) {
  __m256 t[8], u[8];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const int b = 4 * i;
    u[b] = _mm256_shuffle_ps(t[b], t[b + 2], 0x44);
    u[b + 1] = _mm256_shuffle_ps(t[b], t[b + 2], 0xee);
    u[b + 2] = _mm256_shuffle_ps(t[b + 1], t[b + 3], 0x44);
    u[b + 3] = _mm256_shuffle_ps(t[b + 1], t[b + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}

}  // namespace
}  // namespace narrowcast
