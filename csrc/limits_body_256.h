// The limits on 256 bits. Before including, a tier defines NARROWCAST_DOT(sum, a, b): 32 products of bytes, added in fours.
#pragma once

#include <immintrin.h>

#include "limits.h"

namespace narrowcast {
namespace {

constexpr int kChains = 10;  // independent sums: latency 4 to 5, two per cycle; 16 registers in all
// GCC keeps an array of sums in memory, but named variables in registers.
#define NARROWCAST_EACH(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9)

int64_t multiply_int8(int64_t iterations) {
  __m256i a = _mm256_set1_epi8(3);
  const __m256i b = _mm256_set1_epi8(5);
#define NARROWCAST_DECLARE(i) __m256i sum##i = _mm256_setzero_si256();
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
  // `a` passes through the asm so that every product is computed anew.
#define NARROWCAST_STEP(i)               \
  sum##i = NARROWCAST_DOT(sum##i, a, b); \
  asm volatile("" : "+x"(a), "+x"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 32;
}

int64_t multiply_float32(int64_t iterations) {
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(0.25f);
#define NARROWCAST_DECLARE(i) __m256 sum##i = _mm256_setzero_ps();
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
#define NARROWCAST_STEP(i) \
  sum##i = _mm256_fmadd_ps(a, b, sum##i); \
  asm volatile("" : "+x"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 8;
}

void read(const void* data, int64_t bytes, int64_t repeats) {
  const char* begin = static_cast<const char*>(data);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (const char* at = begin; at < begin + bytes; at += 256) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m256i line = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at) + i);
        asm volatile("" ::"x"(line));  // the load itself, and nothing after it
      }
    }
  }
}

}  // namespace
}  // namespace narrowcast
