// Activation quantizers, NEON: 16 values per step.
#include "quantize.h"

#include "simd_neon.h"

namespace narrowcast {
namespace {

inline uint32x4_t magnitude_bits(float32x4_t value) {
  return vandq_u32(vreinterpretq_u32_f32(value), vdupq_n_u32(0x7fffffff));
}

template <FloatType type>
uint32_t absmax_of(const void* x, int64_t count) {
  uint32x4_t largest = vdupq_n_u32(0), other = largest;
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) {
    largest = vmaxq_u32(largest, magnitude_bits(load4<type>(x, index)));
    other = vmaxq_u32(other, magnitude_bits(load4<type>(x, index + 4)));
  }
  for (; index < count; index += 4) {
    largest = vmaxq_u32(largest, magnitude_bits(load4_tail<type>(x, index, count - index)));
  }
  return vmaxvq_u32(vmaxq_u32(largest, other));
}

template <FloatType type>
bool range_of(const void* x, int64_t count, float* low, float* high) {
  float32x4_t least = vdupq_n_f32(0.0f), most = least;
  uint32x4_t largest = vdupq_n_u32(0);
  for (int64_t index = 0; index < count; index += 4) {
    const float32x4_t value = load4_tail<type>(x, index, count - index);
    // A comparison with a NaN is false, as in the scalar body.
    least = vbslq_f32(vcltq_f32(value, least), value, least);
    most = vbslq_f32(vcgtq_f32(value, most), value, most);
    largest = vmaxq_u32(largest, magnitude_bits(value));
  }
  *low = vminvq_f32(least);
  *high = vmaxvq_f32(most);
  return vmaxvq_u32(largest) < kNonFiniteBits;
}

// 16 integers in 0..255 to bytes in order.
inline uint8x16_t pack16(const int32x4_t v[4]) {
  const int16x8_t low = vcombine_s16(vqmovn_s32(v[0]), vqmovn_s32(v[1]));
  const int16x8_t high = vcombine_s16(vqmovn_s32(v[2]), vqmovn_s32(v[3]));
  return vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
}

// One range for all values, or one per value at `index`.
struct OneRange {
  float32x4_t inverses, low, high;
  int32x4_t zero_points;

  float32x4_t inverse(int64_t, int64_t) const { return inverses; }
  int32x4_t zero_point(int64_t, int64_t) const { return zero_points; }
  float32x4_t clamp(float32x4_t value) const { return vminq_f32(vmaxq_f32(value, low), high); }
};

struct ChannelRanges {
  const float* inverses;
  const int32_t* zero_points;

  float32x4_t inverse(int64_t index, int64_t count) const {
    return load4_tail<FloatType::float32>(inverses, index, count);
  }
  int32x4_t zero_point(int64_t index, int64_t count) const {
    return vreinterpretq_s32_f32(load4_tail<FloatType::float32>(zero_points, index, count));
  }
  // Codes beyond -255..255 are beyond 0..255 with any zero point: packing saturates them.
  float32x4_t clamp(float32x4_t value) const {
    return vminq_f32(vmaxq_f32(value, vdupq_n_f32(-255.0f)), vdupq_n_f32(255.0f));
  }
};

template <FloatType type, class Ranges>
bool uint8_of(const void* x, int64_t count, const Ranges& ranges, uint8_t* codes) {
  uint32x4_t largest = vdupq_n_u32(0);
  for (int64_t index = 0; index < count; index += 16) {
    int32x4_t parts[4];
    for (int part = 0; part < 4; ++part) {
      const int64_t at = index + 4 * part, left = count - at;
      const float32x4_t value = load4_tail<type>(x, at, left);
      largest = vmaxq_u32(largest, magnitude_bits(value));
      const float32x4_t step = ranges.clamp(vmulq_f32(value, ranges.inverse(at, left)));
      parts[part] = vaddq_s32(vcvtnq_s32_f32(step), ranges.zero_point(at, left));
    }
    if (count - index >= 16) {
      vst1q_u8(codes + index, pack16(parts));
    } else {
      uint8_t bytes[16];
      vst1q_u8(bytes, pack16(parts));
      memcpy(codes + index, bytes, static_cast<size_t>(count - index));
    }
  }
  return vmaxvq_u32(largest) < kNonFiniteBits;
}

template <FloatType type>
bool groups_of(const void* x, int64_t count, uint8_t* codes, float* scales) {
  for (int64_t start = 0; start < count; start += kActivationGroup, codes += kActivationGroup) {
    float32x4_t values[8];
    uint32x4_t largest = vdupq_n_u32(0);
    for (int part = 0; part < 8; ++part) {
      const int64_t index = start + 4 * part;
      values[part] = load4_tail<type>(x, index, count - index);
      largest = vmaxq_u32(largest, magnitude_bits(values[part]));
    }
    const uint32_t bits = vmaxvq_u32(largest);
    if (bits >= kNonFiniteBits) return false;
    const bool zero = bits < kSmallestRangeBits;
    const float32x4_t inverse = vdupq_n_f32(zero ? 0.0f : 127.0f / bits_to_float(bits));
    int16x4_t steps[8];
    for (int part = 0; part < 8; ++part) steps[part] = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(values[part], inverse)));
    int8x8_t bytes[4];
    for (int part = 0; part < 4; ++part) bytes[part] = vmovn_s16(vcombine_s16(steps[2 * part], steps[2 * part + 1]));
    const uint8x16_t middle = vdupq_n_u8(128);  // adding 128 to a byte flips its top bit
    vst1q_u8(codes, veorq_u8(vreinterpretq_u8_s8(vcombine_s8(bytes[0], bytes[1])), middle));
    vst1q_u8(codes + 16, veorq_u8(vreinterpretq_u8_s8(vcombine_s8(bytes[2], bytes[3])), middle));
    *scales++ = zero ? 1.0f : bits_to_float(bits) / 127.0f;
  }
  return true;
}

uint32_t absmax_bits(const void* x, FloatType type, int64_t count) {
  if (type == FloatType::float32) return absmax_of<FloatType::float32>(x, count);
  if (type == FloatType::bfloat16) return absmax_of<FloatType::bfloat16>(x, count);
  return absmax_of<FloatType::float16>(x, count);
}

bool range(const void* x, FloatType type, int64_t count, float* low, float* high) {
  if (type == FloatType::float32) return range_of<FloatType::float32>(x, count, low, high);
  if (type == FloatType::bfloat16) return range_of<FloatType::bfloat16>(x, count, low, high);
  return range_of<FloatType::float16>(x, count, low, high);
}

template <class Ranges>
bool any_uint8(const void* x, FloatType type, int64_t count, const Ranges& ranges, uint8_t* codes) {
  if (type == FloatType::float32) return uint8_of<FloatType::float32>(x, count, ranges, codes);
  if (type == FloatType::bfloat16) return uint8_of<FloatType::bfloat16>(x, count, ranges, codes);
  return uint8_of<FloatType::float16>(x, count, ranges, codes);
}

bool to_uint8(const void* x, FloatType type, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  const OneRange range = {vdupq_n_f32(inverse), vdupq_n_f32(static_cast<float>(-zero_point)),
                          vdupq_n_f32(static_cast<float>(255 - zero_point)), vdupq_n_s32(zero_point)};
  return any_uint8(x, type, count, range, codes);
}

bool to_uint8_channels(const void* x, FloatType type, int64_t count, const float* inverse, const int32_t* zero_point,
                       uint8_t* codes) {
  return any_uint8(x, type, count, ChannelRanges{inverse, zero_point}, codes);
}

bool to_uint8_groups(const void* x, FloatType type, int64_t count, uint8_t* codes, float* scales) {
  if (type == FloatType::float32) return groups_of<FloatType::float32>(x, count, codes, scales);
  if (type == FloatType::bfloat16) return groups_of<FloatType::bfloat16>(x, count, codes, scales);
  return groups_of<FloatType::float16>(x, count, codes, scales);
}

}  // namespace

const QuantizeKernels quantize_neondot = {absmax_bits, range, to_uint8, to_uint8_channels, to_uint8_groups};

}  // namespace narrowcast
