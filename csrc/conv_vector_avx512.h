// AVX-512 VNNI vector operations: 16 lanes; the bodies in *_body.h are written on these names.
#pragma once

#include <immintrin.h>
#include <stdint.h>

// GCC 12 warns about its own _mm512_undefined_*() (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#define NC_INLINE static inline __attribute__((always_inline))

namespace narrowcast {
namespace {

constexpr int kLanes = 16;
constexpr bool kSignedCodes = false;
constexpr int kMaxVectors = 4;
constexpr int kTileRows = 12;
using Float = __m512;
using Int = __m512i;
using Bytes = __m512i;    // 16 lanes of four u8 activations
using Weights = __m512i;  // 16 lanes of four s8 weights

NC_INLINE __mmask16 lane_mask(int64_t count) {
  return count >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
}

NC_INLINE Float load(const float* p) { return _mm512_loadu_ps(p); }
NC_INLINE Float load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(lane_mask(n), p); }
NC_INLINE void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
NC_INLINE void store_part(float* p, int64_t n, Float v) { _mm512_mask_storeu_ps(p, lane_mask(n), v); }
NC_INLINE Float spread(float v) { return _mm512_set1_ps(v); }
NC_INLINE Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
NC_INLINE Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
NC_INLINE Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
NC_INLINE Float divide(Float a, Float b) { return _mm512_div_ps(a, b); }
// x * 0 + seen: a value that is not finite leaves a NaN in `seen`.
NC_INLINE Float watch(Float seen, Float v) { return _mm512_fmadd_ps(v, _mm512_setzero_ps(), seen); }
NC_INLINE bool any_nan(Float v) { return _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q) != 0; }
NC_INLINE Float at_most(Float v, Float high) { return _mm512_min_ps(v, high); }
// The bound is returned for a NaN: the caller reports the NaN, the code stays in range.
NC_INLINE Float clamp(Float v, Float low, Float high) { return _mm512_min_ps(_mm512_max_ps(v, low), high); }
NC_INLINE Int to_int(Float v) { return _mm512_cvtps_epi32(v); }
NC_INLINE Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
NC_INLINE Int float_bits(Float v) { return _mm512_castps_si512(v); }
NC_INLINE Float bits_float(Int v) { return _mm512_castsi512_ps(v); }
NC_INLINE Float select_less(Float a, Float b, Float yes, Float no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}

NC_INLINE Int load_int(const int32_t* p) { return _mm512_loadu_si512(p); }
NC_INLINE Int load_int_part(const int32_t* p, int64_t n) { return _mm512_maskz_loadu_epi32(lane_mask(n), p); }
NC_INLINE void store_int(int32_t* p, Int v) { _mm512_storeu_si512(p, v); }
NC_INLINE Int spread_int(int32_t v) { return _mm512_set1_epi32(v); }
NC_INLINE Int add_int(Int a, Int b) { return _mm512_add_epi32(a, b); }
NC_INLINE Int subtract_int(Int a, Int b) { return _mm512_sub_epi32(a, b); }
NC_INLINE Int multiply_int(Int a, Int b) { return _mm512_mullo_epi32(a, b); }
NC_INLINE Int and_int(Int a, Int b) { return _mm512_and_si512(a, b); }
NC_INLINE Int or_int(Int a, Int b) { return _mm512_or_si512(a, b); }
NC_INLINE Int max_unsigned(Int a, Int b) { return _mm512_max_epu32(a, b); }
template <int kBits>
NC_INLINE Int shift_left(Int v) { return _mm512_slli_epi32(v, kBits); }
NC_INLINE uint32_t largest_unsigned(Int v) { return _mm512_reduce_max_epu32(v); }

// Four vectors of integers <= 255 - offset to bytes with the offset added, saturated at 0; per 128-bit part, four
// bytes of each vector.
NC_INLINE __m512i pack_bytes(const Int v[4], int32_t offset) {
  const __m512i plus = _mm512_set1_epi16(static_cast<int16_t>(offset));
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(v[0], v[1]), plus);
  return _mm512_packus_epi16(low, _mm512_adds_epi16(_mm512_packs_epi32(v[2], v[3]), plus));
}
// Lane x = byte x of the four vectors.
NC_INLINE Int pack_lanes(const Int v[4], int32_t offset) {
  const __m128i order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_shuffle_epi8(pack_bytes(v, offset), _mm512_broadcast_i32x4(order));
}
// The bytes of the four vectors one after the other.
NC_INLINE void store_packed(uint8_t* p, const Int v[4], int32_t offset) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, pack_bytes(v, offset)));
}

// The bytes of four vectors one after the other, saturated.
using Packed = __m512i;
NC_INLINE Packed pack_pixels(const Int v[4]) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, pack_bytes(v, 0));
}
NC_INLINE Packed at_least(Packed a, Packed b) { return _mm512_max_epu8(a, b); }
// Each vector's bytes, `step` bytes apart.
NC_INLINE void store_pixels(uint8_t* p, int64_t step, Packed v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + step), _mm512_extracti32x4_epi32(v, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * step), _mm512_extracti32x4_epi32(v, 2));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * step), _mm512_extracti32x4_epi32(v, 3));
}

// The low byte of each lane.
NC_INLINE void store_low_bytes(uint8_t* p, Int v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}
NC_INLINE void store_low_bytes_part(uint8_t* p, int64_t n, Int v) {
  // A masked store of bytes takes a dozen cycles here.
  __m128i bytes = _mm512_cvtepi32_epi8(v);
  if (n & 8) {
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), bytes);
    bytes = _mm_unpackhi_epi64(bytes, bytes), p += 8;
  }
  if (n & 4) {
    _mm_storeu_si32(p, bytes);
    bytes = _mm_srli_epi64(bytes, 32), p += 4;
  }
  const int last = _mm_cvtsi128_si32(bytes);
  if (n & 2) *p++ = static_cast<uint8_t>(last), *p++ = static_cast<uint8_t>(last >> 8);
  if (n & 1) *p = static_cast<uint8_t>(n & 2 ? last >> 16 : last);
}
NC_INLINE Int load_signed_bytes(const int8_t* p) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

NC_INLINE Int zero_int() { return _mm512_setzero_si512(); }
// What a sum starts from besides 0; see conv_vector_neon.h.
NC_INLINE Int start_sum(Int sum, const Weights&) { return sum; }
NC_INLINE Bytes spread_bytes(const uint8_t* p) {
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  return _mm512_set1_epi32(word);
}
NC_INLINE Bytes load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
NC_INLINE Weights load_weights(const int8_t* p) { return _mm512_loadu_si512(p); }
NC_INLINE Int dot(Int sum, Bytes a, Weights w) { return _mm512_dpbusd_epi32(sum, a, w); }

// quad[c] lane x = word c of pixel x; pixel x receives words 0..3 as 16 consecutive bytes.
NC_INLINE void store_four_words(uint8_t* p, int64_t stride, int64_t count, const Int quad[4]) {
  const __m512i a = _mm512_unpacklo_epi32(quad[0], quad[1]), b = _mm512_unpackhi_epi32(quad[0], quad[1]);
  const __m512i c = _mm512_unpacklo_epi32(quad[2], quad[3]), d = _mm512_unpackhi_epi32(quad[2], quad[3]);
  const __m512i pixels[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                             _mm512_unpackhi_epi64(b, d)};
  if (count >= 16) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      uint8_t* to = p + i * stride;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(pixels[i]));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 4 * stride), _mm512_extracti32x4_epi32(pixels[i], 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8 * stride), _mm512_extracti32x4_epi32(pixels[i], 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 12 * stride), _mm512_extracti32x4_epi32(pixels[i], 3));
    }
    return;
  }
  alignas(64) uint8_t all[4][64];
  for (int i = 0; i < 4; ++i) _mm512_store_si512(all[i], pixels[i]);
  for (int64_t x = 0; x < count; ++x) __builtin_memcpy(p + x * stride, all[x % 4] + x / 4 * 16, 16);
}

NC_INLINE void transpose(Float rows[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  __m512d u[16];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int b = 4 * i;
    u[b] = _mm512_unpacklo_pd(_mm512_castps_pd(t[b]), _mm512_castps_pd(t[b + 2]));
    u[b + 1] = _mm512_unpackhi_pd(_mm512_castps_pd(t[b]), _mm512_castps_pd(t[b + 2]));
    u[b + 2] = _mm512_unpacklo_pd(_mm512_castps_pd(t[b + 1]), _mm512_castps_pd(t[b + 3]));
    u[b + 3] = _mm512_unpackhi_pd(_mm512_castps_pd(t[b + 1]), _mm512_castps_pd(t[b + 3]));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_castpd_ps(u[i]), b = _mm512_castpd_ps(u[i + 4]);
    const __m512 c = _mm512_castpd_ps(u[i + 8]), d = _mm512_castpd_ps(u[i + 12]);
    const __m512 p = _mm512_shuffle_f32x4(a, b, 0x88), q = _mm512_shuffle_f32x4(c, d, 0x88);
    const __m512 r = _mm512_shuffle_f32x4(a, b, 0xdd), s = _mm512_shuffle_f32x4(c, d, 0xdd);
    rows[i] = _mm512_shuffle_f32x4(p, q, 0x88);
    rows[i + 4] = _mm512_shuffle_f32x4(r, s, 0x88);
    rows[i + 8] = _mm512_shuffle_f32x4(p, q, 0xdd);
    rows[i + 12] = _mm512_shuffle_f32x4(r, s, 0xdd);
  }
}

}  // namespace
}  // namespace narrowcast
