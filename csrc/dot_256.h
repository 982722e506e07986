// vpdpbusd on 256 bits, in the encoding that the file is compiled for: AVX-VNNI's or AVX-512's.
// NARROWCAST_DOT_256 is 0 where there is none.
#pragma once

#include <immintrin.h>

#if defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__))
#define NARROWCAST_DOT_256 1
#else
#define NARROWCAST_DOT_256 0
#endif

#if NARROWCAST_DOT_256

namespace narrowcast {
namespace {

// Every 32-bit lane of `sum` plus its four products of an unsigned byte of `a` and a signed byte of `b`; exact.
static inline __attribute__((always_inline)) __m256i dot_bytes(__m256i sum, __m256i a, __m256i b) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
  return _mm256_dpbusd_epi32(sum, a, b);
#endif
}

}  // namespace
}  // namespace narrowcast

#endif
