// Activation functions in float32 on a float or a vector of floats (GCC and Clang vector types): the same operations in
// every tier, so the same bits. A NaN stays a NaN.
#pragma once

#include <stdint.h>
#include <string.h>

#include "gelu_table.h"
#include "linear.h"

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace narrowcast {
namespace {

// Adding 1.5 * 2^23 leaves round(x) in the low bits of the sum.
constexpr float kRounder = 12582912.0f;

template <class To, class From>
inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

// a * b + c, rounded once in every tier.
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
typedef float Vector4 __attribute__((vector_size(16)));
inline Vector4 multiply_add(Vector4 a, Vector4 b, Vector4 c) {
#if defined(__ARM_NEON)
  return (Vector4)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  Vector4 result;
  for (int lane = 0; lane < 4; ++lane) result[lane] = multiply_add(a[lane], b[lane], c[lane]);
  return result;
#endif
}
#ifdef __FMA__
typedef float Vector8 __attribute__((vector_size(32)));
inline Vector8 multiply_add(Vector8 a, Vector8 b, Vector8 c) {
  return (Vector8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#endif
#ifdef __AVX512F__
typedef float Vector16 __attribute__((vector_size(64)));
inline Vector16 multiply_add(Vector16 a, Vector16 b, Vector16 c) {
  return (Vector16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#endif

// e^x for x <= 88; below -87 as for -87 (1.6e-38). Cody and Waite's reduction, a polynomial as in Cephes' expf.
template <class Float, class Int>
inline Float exponential(Float x) {
  x = x > -87.0f ? x : Float{} - 87.0f;  // also for a NaN, whose bits the sum below could overflow
  const Float zero = {};
  const Float shifted = multiply_add(x, zero + 1.44269504f, zero + kRounder);
  const Float n = shifted - kRounder;
  const Float r = multiply_add(n, zero + 2.12194440e-4f, multiply_add(n, zero - 0.693359375f, x));
  Float p = multiply_add(r, zero + 1.9875691500e-4f, zero + 1.3981999507e-3f);
  p = multiply_add(p, r, zero + 8.3334519073e-3f);
  p = multiply_add(p, r, zero + 4.1665795894e-2f);
  p = multiply_add(p, r, zero + 1.6666665459e-1f);
  p = multiply_add(p, r, zero + 5.0000001201e-1f);
  p = multiply_add(p, r * r, r) + 1.0f;
  const Int exponent = (bits_as<Int>(shifted) - 0x4b400000) << 23;
  return bits_as<Float>(bits_as<Int>(p) + exponent);
}

// x / (1 + e^-s). Below -100 the quotient is taken as that of -100, which is 0 to 36 places.
template <class Float, class Int>
inline Float gated(Float x, Float s) {
  const Float negative = -s > 88.0f ? Float{} + 88.0f : -s;
  return (x < -100.0f ? Float{} - 100.0f : x) / (1.0f + exponential<Float, Int>(negative));
}

// table[index[lane]] of 16 numbers; an index is below 16.
inline float look_up(const float* table, int32_t index) { return table[index]; }
template <class Float, class Int>
inline Float look_up(const float* table, Int index) {
#ifdef __AVX512F__
  if constexpr (sizeof(Float) == 64) return (Float)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
#endif
#ifdef __AVX2__
  if constexpr (sizeof(Float) == 32) {
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (Float)_mm256_blendv_ps(low, high, (__m256)(index << 28));
  }
#endif
  Float result;
  for (unsigned lane = 0; lane < sizeof(Float) / 4; ++lane) result[lane] = table[index[lane]];
  return result;
}

// x Phi(x) = max(x, 0) - |x| P(X > |x|), the tail from a table of polynomials: a third of the time of an exponential and a
// division.
template <class Float, class Int>
inline Float gelu(Float x) {
  const Float zero = {};
  const Float magnitude = x < 0.0f ? -x : x;
  const Float a = magnitude > kLastTail ? zero + kLastTail : magnitude;
  const Float position = multiply_add(a, zero + kPiecesPerUnit, zero - 0.5f);
  const Float shifted = position + kRounder;
  const Float u = position - (shifted - kRounder);
  const Int piece = bits_as<Int>(shifted) & (kTailPieces - 1);
  Float p;
  if constexpr (sizeof(Float) == 4) {
    p = look_up(kNormalTail[5], piece);
    for (int k = 4; k >= 0; --k) p = multiply_add(p, u, look_up(kNormalTail[k], piece));
  } else {
    p = look_up<Float, Int>(kNormalTail[5], piece);
#pragma GCC unroll 5
    for (int k = 4; k >= 0; --k) p = multiply_add(p, u, look_up<Float, Int>(kNormalTail[k], piece));
  }
  return (x < 0.0f ? zero : x) - a * p;
}

template <class Float, class Int>
inline Float fuse(Fused fused, Float x) {
  switch (fused) {
    case Fused::none: return x;
    case Fused::relu: return x < 0.0f ? Float{} : x;
    case Fused::gelu: return gelu<Float, Int>(x);
    case Fused::gelu_tanh: {  // 0.5 (1 + tanh(u)) = 1 / (1 + e^(-2 u))
      const Float inner = x * (0.044715f * (x * x) + 1.0f);
      return gated<Float, Int>(x, inner * 1.5957691216057308f);
    }
    default: return gated<Float, Int>(x, x);
  }
}

}  // namespace
}  // namespace narrowcast
