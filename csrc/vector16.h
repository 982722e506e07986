// Sixteen floats as one value on every tier: the compiler's vector extension, split into what the file's instruction
// set has. For bodies that are written once and compiled per tier; they include nothing of the standard library.
#pragma once

#include <string.h>

#include "kernels.h"

#pragma GCC diagnostic ignored "-Wpsabi"  // these functions are inlined: no vector is ever passed between files

namespace narrowcast {
namespace {

typedef float Float16 __attribute__((vector_size(64)));
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

__attribute__((always_inline)) inline Float16 smaller(Float16 a, Float16 b) { return a < b ? a : b; }
__attribute__((always_inline)) inline Float16 larger(Float16 a, Float16 b) { return a > b ? a : b; }

// Nearest integer, ties to even; for magnitudes up to 2^22. The sum has no bits left for a fraction.
__attribute__((always_inline)) inline Float16 nearest(Float16 value) {
  const Float16 magic = splat(12582912.0f);  // 1.5 * 2^23
  return (value + magic) - magic;
}

__attribute__((always_inline)) inline float smallest_of(Float16 value) {
  float least = value[0];
  for (int lane = 1; lane < kLanes; ++lane) least = value[lane] < least ? value[lane] : least;
  return least;
}

__attribute__((always_inline)) inline float largest_of(Float16 value) {
  float most = value[0];
  for (int lane = 1; lane < kLanes; ++lane) most = value[lane] > most ? value[lane] : most;
  return most;
}

}  // namespace
}  // namespace narrowcast
