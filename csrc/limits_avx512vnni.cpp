// The limits of AVX-512 with VNNI: vpdpbusd, FMA and vdpbf16ps on 512 bits.
#include <immintrin.h>

#include "limits.h"

namespace narrowcast {
namespace {

constexpr int kChains = 16;  // independent sums: latency 4, at most two per cycle
// GCC keeps an array of sums in memory, but named variables in registers.
#define NARROWCAST_EACH(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)

int64_t multiply_int8(int64_t iterations) {
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(5);
#define NARROWCAST_DECLARE(i) __m512i sum##i = _mm512_setzero_si512();
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
  // one instruction per sum and round: nothing is hoisted or merged
#define NARROWCAST_STEP(i) \
  sum##i = _mm512_dpbusd_epi32(sum##i, a, b); \
  asm volatile("" : "+v"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 64;
}

int64_t multiply_float32(int64_t iterations) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(0.25f);
#define NARROWCAST_DECLARE(i) __m512 sum##i = _mm512_setzero_ps();
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
#define NARROWCAST_STEP(i) \
  sum##i = _mm512_fmadd_ps(a, b, sum##i); \
  asm volatile("" : "+v"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 16;
}

// The tier does not demand BF16, so this one function does, and its caller asks the CPU first.
__attribute__((target("avx512bf16"))) int64_t multiply_bfloat16(int64_t iterations) {
  const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f00), b = (__m512bh)_mm512_set1_epi16(0x3e80);  // 0.5, 0.25
#define NARROWCAST_DECLARE(i) __m512 sum##i = _mm512_setzero_ps();
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
#define NARROWCAST_STEP(i) \
  sum##i = _mm512_dpbf16_ps(sum##i, a, b); \
  asm volatile("" : "+v"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 32;
}

void read(const void* data, int64_t bytes, int64_t repeats) {
  const char* begin = static_cast<const char*>(data);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (const char* at = begin; at < begin + bytes; at += 512) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const __m512i line = _mm512_loadu_si512(at + 64 * i);
        asm volatile("" ::"v"(line));  // the load itself, and nothing after it
      }
    }
  }
}

}  // namespace

extern const LimitKernels kLimitsAvx512vnni{multiply_int8, multiply_float32, multiply_bfloat16, read};

}  // namespace narrowcast
