// Arm vector operations: 4 lanes; the bodies in *_body.h are written on these names. Compiled for the dot product
// instructions alone, codes are taken less 128, since SDOT wants two signed operands, and every sum starts at 128 times
// the sum of its weights; with those of I8MM, USDOT takes them as they are.
#pragma once

#include <arm_neon.h>
#include <stdint.h>

#define NC_INLINE static inline __attribute__((always_inline))

namespace narrowcast {
namespace {

constexpr int kLanes = 4;
constexpr int kMaxVectors = 1;
constexpr int kTileRows = 5;  // GCC 12 spills sums at 6
#if defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kSignedCodes = false;
#else
constexpr bool kSignedCodes = true;
#endif
using Float = float32x4_t;
using Int = int32x4_t;
using Bytes = uint8x16_t;
using Weights = int8x16_t;

NC_INLINE Float load(const float* p) { return vld1q_f32(p); }
NC_INLINE Float load_part(const float* p, int64_t n) {
  float lanes[4] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vld1q_f32(lanes);
}
NC_INLINE void store(float* p, Float v) { vst1q_f32(p, v); }
NC_INLINE void store_part(float* p, int64_t n, Float v) {
  float lanes[4];
  vst1q_f32(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
NC_INLINE Float spread(float v) { return vdupq_n_f32(v); }
NC_INLINE Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
NC_INLINE Float add(Float a, Float b) { return vaddq_f32(a, b); }
NC_INLINE Float subtract(Float a, Float b) { return vsubq_f32(a, b); }
NC_INLINE Float divide(Float a, Float b) { return vdivq_f32(a, b); }
// A value that is not finite leaves a NaN in `seen`.
NC_INLINE Float watch(Float seen, Float v) { return vfmaq_f32(seen, v, vdupq_n_f32(0.0f)); }
NC_INLINE bool any_nan(Float v) { return vminvq_u32(vceqq_f32(v, v)) == 0; }
NC_INLINE Float at_most(Float v, Float high) { return vminq_f32(v, high); }
// The bound is returned for a NaN: the caller reports the NaN. Compared and not by FMAX, whose NaN and zeros of
// different sign come out otherwise than on the other tiers.
NC_INLINE Float clamp(Float v, Float low, Float high) {
  const Float raised = vbslq_f32(vcgtq_f32(v, low), v, low);
  return vbslq_f32(vcltq_f32(raised, high), raised, high);
}
NC_INLINE Int to_int(Float v) { return vcvtnq_s32_f32(v); }
NC_INLINE Float to_float(Int v) { return vcvtq_f32_s32(v); }
NC_INLINE Int float_bits(Float v) { return vreinterpretq_s32_f32(v); }
NC_INLINE Float bits_float(Int v) { return vreinterpretq_f32_s32(v); }
NC_INLINE Float select_less(Float a, Float b, Float yes, Float no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }

NC_INLINE Int load_int(const int32_t* p) { return vld1q_s32(p); }
NC_INLINE Int load_int_part(const int32_t* p, int64_t n) {
  int32_t lanes[4] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return vld1q_s32(lanes);
}
NC_INLINE void store_int(int32_t* p, Int v) { vst1q_s32(p, v); }
NC_INLINE Int spread_int(int32_t v) { return vdupq_n_s32(v); }
NC_INLINE Int zero_int() { return vdupq_n_s32(0); }
NC_INLINE Int add_int(Int a, Int b) { return vaddq_s32(a, b); }
NC_INLINE Int subtract_int(Int a, Int b) { return vsubq_s32(a, b); }
NC_INLINE Int multiply_int(Int a, Int b) { return vmulq_s32(a, b); }
NC_INLINE Int and_int(Int a, Int b) { return vandq_s32(a, b); }
NC_INLINE Int or_int(Int a, Int b) { return vorrq_s32(a, b); }
NC_INLINE Int max_unsigned(Int a, Int b) {
  return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
}
template <int kBits>
NC_INLINE Int shift_left(Int v) { return vshlq_n_s32(v, kBits); }
NC_INLINE uint32_t largest_unsigned(Int v) { return vmaxvq_u32(vreinterpretq_u32_s32(v)); }

// Four vectors of integers <= 255 - offset as the bytes of the four vectors one after the other, with the offset
// added, saturated at 0.
NC_INLINE uint8x16_t pack_bytes(const Int v[4], int32_t offset) {
  const int16x8_t plus = vdupq_n_s16(static_cast<int16_t>(offset));
  const int16x8_t low = vqaddq_s16(vcombine_s16(vqmovn_s32(v[0]), vqmovn_s32(v[1])), plus);
  const int16x8_t high = vqaddq_s16(vcombine_s16(vqmovn_s32(v[2]), vqmovn_s32(v[3])), plus);
  return vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
}
// Lane x = byte x of the four vectors.
NC_INLINE Int pack_lanes(const Int v[4], int32_t offset) {
  const uint8_t order[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
  return vreinterpretq_s32_u8(vqtbl1q_u8(pack_bytes(v, offset), vld1q_u8(order)));
}
NC_INLINE void store_packed(uint8_t* p, const Int v[4], int32_t offset) { vst1q_u8(p, pack_bytes(v, offset)); }

// The bytes of four vectors one after the other, saturated.
using Packed = uint8x16_t;
NC_INLINE Packed pack_pixels(const Int v[4]) { return pack_bytes(v, 0); }
NC_INLINE Packed at_least(Packed a, Packed b) { return vmaxq_u8(a, b); }
// Each vector's bytes, `step` bytes apart.
NC_INLINE void store_pixels(uint8_t* p, int64_t step, Packed v) {
  uint8_t bytes[16];
  vst1q_u8(bytes, v);
  for (int i = 0; i < 4; ++i) __builtin_memcpy(p + i * step, bytes + 4 * i, 4);
}

// The low byte of each lane, for lanes in 0..255.
NC_INLINE uint32_t low_bytes(Int v) {
  const int16x4_t words = vqmovn_s32(v);
  return vget_lane_u32(vreinterpret_u32_u8(vqmovun_s16(vcombine_s16(words, words))), 0);
}
NC_INLINE void store_low_bytes(uint8_t* p, Int v) {
  const uint32_t bytes = low_bytes(v);
  __builtin_memcpy(p, &bytes, 4);
}
NC_INLINE void store_low_bytes_part(uint8_t* p, int64_t n, Int v) {
  const uint32_t bytes = low_bytes(v);
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<uint8_t>(bytes >> (8 * i));
}
NC_INLINE Int load_signed_bytes(const int8_t* p) {
  int32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  return vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)))));
}

NC_INLINE Bytes signed_codes(Bytes v) { return kSignedCodes ? veorq_u8(v, vdupq_n_u8(128)) : v; }
NC_INLINE Bytes spread_bytes(const uint8_t* p) {
  return signed_codes(vreinterpretq_u8_u32(vld1q_dup_u32(reinterpret_cast<const uint32_t*>(p))));
}
NC_INLINE Bytes load_bytes(const uint8_t* p) { return signed_codes(vld1q_u8(p)); }
NC_INLINE Weights load_weights(const int8_t* p) { return vld1q_s8(p); }

#if defined(__ARM_FEATURE_MATMUL_INT8)
NC_INLINE Int dot(Int sum, const Bytes& a, const Weights& w) { return vusdotq_s32(sum, a, w); }
NC_INLINE Int start_sum(Int sum, const Weights&) { return sum; }
#else
NC_INLINE Int dot(Int sum, const Bytes& a, const Weights& w) { return vdotq_s32(sum, vreinterpretq_s8_u8(a), w); }
// 128 is no int8: twice 64.
NC_INLINE Int start_sum(Int sum, const Weights& w) {
  return vdotq_s32(vdotq_s32(sum, w, vdupq_n_s8(64)), w, vdupq_n_s8(64));
}
#endif

NC_INLINE void transpose(Float rows[4]) {
  const float32x4_t a = vzip1q_f32(rows[0], rows[2]), b = vzip2q_f32(rows[0], rows[2]);
  const float32x4_t c = vzip1q_f32(rows[1], rows[3]), d = vzip2q_f32(rows[1], rows[3]);
  rows[0] = vzip1q_f32(a, c);
  rows[1] = vzip2q_f32(a, c);
  rows[2] = vzip1q_f32(b, d);
  rows[3] = vzip2q_f32(b, d);
}

// quad[c] lane x = word c of pixel x; pixel x receives words 0..3 as 16 consecutive bytes.
NC_INLINE void store_four_words(uint8_t* p, int64_t stride, int64_t count, const Int quad[4]) {
  Float rows[4] = {bits_float(quad[0]), bits_float(quad[1]), bits_float(quad[2]), bits_float(quad[3])};
  transpose(rows);
  for (int64_t x = 0; x < 4 && x < count; ++x) vst1q_u8(p + x * stride, vreinterpretq_u8_f32(rows[x]));
}

}  // namespace
}  // namespace narrowcast
