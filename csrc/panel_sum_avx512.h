// Sums of the lanes of vectors, AVX-512.
#pragma once

#include <immintrin.h>

namespace narrowcast {
namespace {

inline float panel_sum(__m512 value) { return _mm512_reduce_add_ps(value); }

inline void panel_sum4(__m512 a, __m512 b, __m512 c, __m512 d, float* sums) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 low = _mm512_shuffle_ps(ab, cd, 0x44), high = _mm512_shuffle_ps(ab, cd, 0xee);
  const __m512 lanes = _mm512_add_ps(low, high);  // a, b, c, d in each 128 bits
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}

}  // namespace
}  // namespace narrowcast
