// Plain C++ in the place of vector operations: one lane; the bodies in *_body.h are written on these names.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define NC_INLINE static inline __attribute__((always_inline))

namespace narrowcast {
namespace {

constexpr int kLanes = 1;
constexpr bool kSignedCodes = false;
constexpr int kMaxVectors = 1;
constexpr int kTileRows = 1;
using Float = float;
using Int = int32_t;
struct Bytes {
  int32_t byte[4];
};
using Weights = Bytes;

// From any address, as the vector loads.
NC_INLINE Float load(const float* p) {
  Float v;
  __builtin_memcpy(&v, p, 4);
  return v;
}
NC_INLINE Float load_part(const float* p, int64_t) { return *p; }
NC_INLINE void store(float* p, Float v) { *p = v; }
NC_INLINE void store_part(float* p, int64_t, Float v) { *p = v; }
NC_INLINE Float spread(float v) { return v; }
NC_INLINE Float multiply(Float a, Float b) { return a * b; }
NC_INLINE Float add(Float a, Float b) { return a + b; }
NC_INLINE Float subtract(Float a, Float b) { return a - b; }
NC_INLINE Float divide(Float a, Float b) { return a / b; }
// A value that is not finite leaves a NaN in `seen`.
NC_INLINE Float watch(Float seen, Float v) { return seen + v * 0.0f; }
NC_INLINE bool any_nan(Float v) { return v != v; }
// At least -512 too: enough for a code to saturate at 0, and to_int stays defined.
NC_INLINE Float at_most(Float v, Float high) {
  const float raised = v > -512.0f ? v : -512.0f;
  return raised < high ? raised : high;
}
// The bound is returned for a NaN: the caller reports the NaN, the code stays in range.
NC_INLINE Float clamp(Float v, Float low, Float high) {
  const float raised = v > low ? v : low;
  return raised < high ? raised : high;
}
// Half to even: the default rounding mode.
NC_INLINE Int to_int(Float v) { return static_cast<int32_t>(__builtin_nearbyintf(v)); }
NC_INLINE Float to_float(Int v) { return static_cast<float>(v); }
NC_INLINE Int float_bits(Float v) {
  int32_t bits;
  __builtin_memcpy(&bits, &v, 4);
  return bits;
}
NC_INLINE Float bits_float(Int v) {
  float value;
  __builtin_memcpy(&value, &v, 4);
  return value;
}
NC_INLINE Float select_less(Float a, Float b, Float yes, Float no) { return a < b ? yes : no; }

NC_INLINE Int load_int(const int32_t* p) { return *p; }
NC_INLINE Int load_int_part(const int32_t* p, int64_t) { return *p; }
NC_INLINE void store_int(int32_t* p, Int v) { *p = v; }
NC_INLINE Int spread_int(int32_t v) { return v; }
NC_INLINE Int add_int(Int a, Int b) { return a + b; }
NC_INLINE Int subtract_int(Int a, Int b) { return a - b; }
NC_INLINE Int multiply_int(Int a, Int b) { return a * b; }
NC_INLINE Int and_int(Int a, Int b) { return a & b; }
NC_INLINE Int or_int(Int a, Int b) { return a | b; }
NC_INLINE Int max_unsigned(Int a, Int b) { return static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b; }
template <int kBits>
NC_INLINE Int shift_left(Int v) { return static_cast<int32_t>(static_cast<uint32_t>(v) << kBits); }
NC_INLINE uint32_t largest_unsigned(Int v) { return static_cast<uint32_t>(v); }

// Four integers <= 255 - offset as bytes of one word with the offset added, saturated at 0.
NC_INLINE Int pack_lanes(const Int v[4], int32_t offset) {
  uint8_t bytes[4];
  for (int i = 0; i < 4; ++i) bytes[i] = static_cast<uint8_t>(v[i] + offset > 0 ? v[i] + offset : 0);
  int32_t word;
  __builtin_memcpy(&word, bytes, 4);
  return word;
}
NC_INLINE void store_packed(uint8_t* p, const Int v[4], int32_t offset) {
  const int32_t word = pack_lanes(v, offset);
  __builtin_memcpy(p, &word, 4);
}

// The bytes of four integers one after the other, saturated.
struct Packed {
  uint8_t byte[4];
};
NC_INLINE Packed pack_pixels(const Int v[4]) {
  Packed packed;
  for (int i = 0; i < 4; ++i) packed.byte[i] = static_cast<uint8_t>(v[i] < 0 ? 0 : v[i] > 255 ? 255 : v[i]);
  return packed;
}
NC_INLINE Packed at_least(Packed a, const Packed& b) {
  for (int i = 0; i < 4; ++i) a.byte[i] = a.byte[i] > b.byte[i] ? a.byte[i] : b.byte[i];
  return a;
}
NC_INLINE void store_pixels(uint8_t* p, int64_t step, const Packed& v) {
  for (int i = 0; i < 4; ++i) p[i * step] = v.byte[i];
}

NC_INLINE void store_low_bytes(uint8_t* p, Int v) { *p = static_cast<uint8_t>(v); }
NC_INLINE void store_low_bytes_part(uint8_t* p, int64_t, Int v) { *p = static_cast<uint8_t>(v); }
NC_INLINE Int load_signed_bytes(const int8_t* p) { return *p; }

NC_INLINE Int zero_int() { return 0; }
// What a sum starts from besides 0; see conv_vector_neon.h.
NC_INLINE Int start_sum(Int sum, const Weights&) { return sum; }
NC_INLINE Bytes load_bytes(const uint8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
NC_INLINE Bytes spread_bytes(const uint8_t* p) { return load_bytes(p); }
NC_INLINE Weights load_weights(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
NC_INLINE Int dot(Int sum, const Bytes& a, const Weights& w) {
  return sum + a.byte[0] * w.byte[0] + a.byte[1] * w.byte[1] + a.byte[2] * w.byte[2] + a.byte[3] * w.byte[3];
}

NC_INLINE void store_four_words(uint8_t* p, int64_t, int64_t, const Int quad[4]) { __builtin_memcpy(p, quad, 16); }
NC_INLINE void transpose(Float*) {}

}  // namespace
}  // namespace narrowcast
