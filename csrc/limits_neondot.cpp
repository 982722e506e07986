// The limits of Arm's vectors of 128 bits: sdot, FMA, loads.
#include <arm_neon.h>

#include "limits.h"

namespace narrowcast {
namespace {

constexpr int kChains = 16;  // independent sums: latency 3 to 4, at most four per cycle
// GCC keeps an array of sums in memory, but named variables in registers.
#define NARROWCAST_EACH(STEP)                                                                              \
  STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) \
  STEP(13) STEP(14) STEP(15)

int64_t multiply_int8(int64_t iterations) {
  const int8x16_t a = vdupq_n_s8(3), b = vdupq_n_s8(5);
#define NARROWCAST_DECLARE(i) int32x4_t sum##i = vdupq_n_s32(0);
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
#define NARROWCAST_STEP(i)          \
  sum##i = vdotq_s32(sum##i, a, b); \
  asm volatile("" : "+w"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 16;
}

int64_t multiply_float32(int64_t iterations) {
  const float32x4_t a = vdupq_n_f32(0.5f), b = vdupq_n_f32(0.25f);
#define NARROWCAST_DECLARE(i) float32x4_t sum##i = vdupq_n_f32(0);
  NARROWCAST_EACH(NARROWCAST_DECLARE)
#undef NARROWCAST_DECLARE
#define NARROWCAST_STEP(i)          \
  sum##i = vfmaq_f32(sum##i, a, b); \
  asm volatile("" : "+w"(sum##i));
  for (int64_t round = 0; round < iterations; ++round) { NARROWCAST_EACH(NARROWCAST_STEP) }
#undef NARROWCAST_STEP
  return iterations * kChains * 4;
}

void read(const void* data, int64_t bytes, int64_t repeats) {
  const int8_t* begin = static_cast<const int8_t*>(data);
  for (int64_t repeat = 0; repeat < repeats; ++repeat) {
    for (const int8_t* at = begin; at < begin + bytes; at += 128) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int8x16_t part = vld1q_s8(at + 16 * i);
        asm volatile("" ::"w"(part));  // the load itself, and nothing after it
      }
    }
  }
}

}  // namespace

extern const LimitKernels kLimitsNeondot{multiply_int8, multiply_float32, nullptr, read};

}  // namespace narrowcast
