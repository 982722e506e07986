// Activation functions in float32 on a float or a vector of floats (GCC and Clang vector types): the same operations in
// every tier, so the same bits. A NaN stays a NaN.
#pragma once

#include <stdint.h>
#include <string.h>

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

// x Phi(x) = max(x, 0) - |x| Phi(-|x|), and Phi(-a) = e^(-a^2 / 2) R(1 / (1 + 0.28 a)) with R fitted to 1.3e-7
// relative.
template <class Float, class Int>
inline Float gelu(Float x) {
  const Float a = x < 0.0f ? -x : x;
  const Float zero = {};
  const Float t = 1.0f / multiply_add(a, zero + 0.28f, zero + 1.0f);
  Float p = multiply_add(t, zero + 0.025290189310908318f, zero - 0.09584400057792664f);
  p = multiply_add(p, t, zero + 0.09606173634529114f);
  p = multiply_add(p, t, zero - 0.009540213271975517f);
  p = multiply_add(p, t, zero + 0.07426337152719498f);
  p = multiply_add(p, t, zero + 0.08322560042142868f);
  p = multiply_add(p, t, zero + 0.10314347594976425f);
  p = multiply_add(p, t, zero + 0.11169584095478058f);
  p = multiply_add(p, t, zero + 0.11170394718647003f);
  p = p * t;
  // a bounded where the tail has long vanished, so that no infinity meets a zero
  const Float tail = (a > 100.0f ? Float{} + 100.0f : a) * p * exponential<Float, Int>(a * a * -0.5f);
  return (x < 0.0f ? Float{} : x) - tail;
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
