// Sixteen floats as one value on every tier: the compiler's vector extension, split into what the file's instruction
// set has. For bodies that are written once and compiled per tier; they include nothing of the standard library.
#pragma once

#include <string.h>

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"  // these functions are inlined: no vector is ever passed between files

namespace narrowcast {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
typedef float Float8 __attribute__((vector_size(32)));
typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int16 __attribute__((vector_size(64)));
typedef int8_t Byte16 __attribute__((vector_size(16)));
typedef uint8_t Unsigned16 __attribute__((vector_size(16)));
typedef double Double16 __attribute__((vector_size(128)));

constexpr int64_t kLanes = 16;

__attribute__((always_inline)) inline Float16 splat(float value) { return Float16{} + value; }

__attribute__((always_inline)) inline Float16 load16f(const float* data) {
  Float16 value;
  memcpy(&value, data, sizeof(value));
  return value;
}

// The first `count` (0..16) values, `fill` behind them.
__attribute__((always_inline)) inline Float16 load16f_tail(const float* data, int64_t count, float fill) {
  if (count >= kLanes) return load16f(data);
  float values[kLanes];
  for (int64_t lane = 0; lane < kLanes; ++lane) values[lane] = lane < count ? data[lane] : fill;
  return load16f(values);
}

__attribute__((always_inline)) inline void store16f(float* data, Float16 value) { memcpy(data, &value, sizeof(value)); }

// Bytes to integers and back; spelled out where GCC 12 makes a dozen instructions of one.
__attribute__((always_inline)) inline Int16 widen(Unsigned16 bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Int16>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
#else
  return __builtin_convertvector(bytes, Int16);
#endif
}

__attribute__((always_inline)) inline Int16 widen(Byte16 bytes) {
#if defined(__AVX512F__)
  return reinterpret_cast<Int16>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes)));
#else
  return __builtin_convertvector(bytes, Int16);
#endif
}

__attribute__((always_inline)) inline Byte16 narrow(Int16 values) {
#if defined(__AVX512F__)
  return reinterpret_cast<Byte16>(_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values)));
#else
  return __builtin_convertvector(values, Byte16);
#endif
}

__attribute__((always_inline)) inline Float16 smaller(Float16 a, Float16 b) { return a < b ? a : b; }
__attribute__((always_inline)) inline Float16 larger(Float16 a, Float16 b) { return a > b ? a : b; }

// Nearest integer, ties to even; for magnitudes up to 2^22. The sum has no bits left for a fraction.
__attribute__((always_inline)) inline Float16 nearest(Float16 value) {
  const Float16 magic = splat(12582912.0f);  // 1.5 * 2^23
  return (value + magic) - magic;
}

// The four 128-bit quarters of a vector joined two by two, then the lanes of the last one.
template <class Join>
__attribute__((always_inline)) inline float join_lanes(Float16 v, Join join) {
  const Float8 eight = join(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
  const Float4 four = join(__builtin_shufflevector(eight, eight, 0, 1, 2, 3), __builtin_shufflevector(eight, eight, 4, 5, 6, 7));
  const Float4 two = join(four, __builtin_shufflevector(four, four, 2, 3, 0, 1));
  return join(two, __builtin_shufflevector(two, two, 1, 0, 3, 2))[0];
}

__attribute__((always_inline)) inline float smallest_of(Float16 value) {
  return join_lanes(value, [](auto a, auto b) __attribute__((always_inline)) { return a < b ? a : b; });
}

__attribute__((always_inline)) inline float largest_of(Float16 value) {
  return join_lanes(value, [](auto a, auto b) __attribute__((always_inline)) { return a > b ? a : b; });
}

// The sum of the lanes in halves: (i, i + 8), then (i, i + 4), (i, i + 2), (i, i + 1).
__attribute__((always_inline)) inline float sum_of(Float16 value) {
  return join_lanes(value, [](auto a, auto b) __attribute__((always_inline)) { return a + b; });
}

}  // namespace
}  // namespace narrowcast
