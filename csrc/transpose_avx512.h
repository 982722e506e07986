// 16 x 16 dword transpositions for the AVX-512 tiles.
#pragma once

#include <immintrin.h>

namespace narrowcast {
namespace {

// 128-bit lane l of result i holds, for the four vectors 4 i .. 4 i + 3, the four dwords of their lane l joined to one.
template <class Join>
inline void join_quads(const __m512i* a, __m512i* quads, Join join) {
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i first =
        join(_mm512_unpacklo_epi32(a[4 * i], a[4 * i + 1]), _mm512_unpackhi_epi32(a[4 * i], a[4 * i + 1]));
    const __m512i second =
        join(_mm512_unpacklo_epi32(a[4 * i + 2], a[4 * i + 3]), _mm512_unpackhi_epi32(a[4 * i + 2], a[4 * i + 3]));
    quads[i] = join(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
}

// Lane i of the result is the 16 lanes of a[i] joined to one.
template <class Join>
inline __m512i join_lanes(const __m512i* a, Join join) {
  __m512i quads[4];
  join_quads(a, quads, join);
  const __m512i low =
      join(_mm512_shuffle_i32x4(quads[0], quads[1], 0x88), _mm512_shuffle_i32x4(quads[0], quads[1], 0xdd));
  const __m512i high =
      join(_mm512_shuffle_i32x4(quads[2], quads[3], 0x88), _mm512_shuffle_i32x4(quads[2], quads[3], 0xdd));
  return join(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd));
}

inline void sum_quads(const __m512i* a, __m512i* quads) {
  join_quads(a, quads, [](__m512i x, __m512i y) { return _mm512_add_epi32(x, y); });
}

inline __m512i sum_lanes(const __m512i* a) {
  return join_lanes(a, [](__m512i x, __m512i y) { return _mm512_add_epi32(x, y); });
}

// As signed numbers.
inline __m512i max_lanes(const __m512i* a) {
  return join_lanes(a, [](__m512i x, __m512i y) { return _mm512_max_epi32(x, y); });
}

// 4 x 4 transposition of 128-bit lanes: lane i of lanes[l] becomes lane l of quads[i].
inline void transpose_lanes(const __m512i* quads, __m512i* lanes) {
  const __m512i even_low = _mm512_shuffle_i32x4(quads[0], quads[1], 0x88);
  const __m512i odd_low = _mm512_shuffle_i32x4(quads[0], quads[1], 0xdd);
  const __m512i even_high = _mm512_shuffle_i32x4(quads[2], quads[3], 0x88);
  const __m512i odd_high = _mm512_shuffle_i32x4(quads[2], quads[3], 0xdd);
  lanes[0] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
  lanes[1] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
  lanes[2] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
  lanes[3] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
}

// 16 rows of 16 dwords to 16 columns of 16 dwords, in place.
inline void transpose16(__m512i* a) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
    a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
  // a[4 i + j] now holds, in 128-bit lane l, dword 4 l + j of rows 4 i .. 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512i quads[4] = {a[j], a[4 + j], a[8 + j], a[12 + j]};
    __m512i lanes[4];
    transpose_lanes(quads, lanes);
    for (int l = 0; l < 4; ++l) b[4 * l + j] = lanes[l];
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = b[i];
}

}  // namespace
}  // namespace narrowcast
