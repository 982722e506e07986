// Activation quantizers, portable bodies.
#include "quantize.h"

#include <math.h>

#include "float_types.h"

namespace narrowcast {
namespace {

uint32_t absmax_bits(const void* x, FloatType type, int64_t count) {
  uint32_t largest = 0;
  for (int64_t index = 0; index < count; ++index) {
    const uint32_t bits = float_to_bits(load_float(x, type, index)) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

bool range(const void* x, FloatType type, int64_t count, float* low, float* high) {
  *low = *high = 0.0f;
  for (int64_t index = 0; index < count; ++index) {
    const float value = load_float(x, type, index);
    *low = value < *low ? value : *low;
    *high = value > *high ? value : *high;
  }
  return absmax_bits(x, type, count) < kNonFiniteBits;
}

bool to_uint8(const void* x, FloatType type, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  const float low = static_cast<float>(-zero_point), high = static_cast<float>(255 - zero_point);
  bool finite = true;
  for (int64_t index = 0; index < count; ++index) {
    const float value = load_float(x, type, index);
    finite &= (float_to_bits(value) & 0x7fffffffu) < kNonFiniteBits;
    float step = value * inverse;
    step = step > low ? step : low;
    step = step < high ? step : high;
    codes[index] = static_cast<uint8_t>(static_cast<int32_t>(lrintf(step)) + zero_point);
  }
  return finite;
}

bool to_uint8_channels(const void* x, FloatType type, int64_t count, const float* inverse, const int32_t* zero_point,
                       uint8_t* codes) {
  bool finite = true;
  for (int64_t index = 0; index < count; ++index) {
    const float value = load_float(x, type, index);
    finite &= to_uint8(&value, FloatType::float32, 1, inverse[index], zero_point[index], codes + index);
  }
  return finite;
}

bool to_uint8_groups(const void* x, FloatType type, int64_t count, uint8_t* codes, float* scales) {
  for (int64_t start = 0; start < count; start += kActivationGroup, codes += kActivationGroup) {
    const int64_t length = count - start < kActivationGroup ? count - start : kActivationGroup;
    float values[kActivationGroup] = {};
    for (int64_t index = 0; index < length; ++index) values[index] = load_float(x, type, start + index);
    const uint32_t bits = absmax_bits(values, FloatType::float32, length);
    if (bits >= kNonFiniteBits) return false;
    const bool zero = bits < kSmallestRangeBits;
    const float inverse = zero ? 0.0f : 127.0f / bits_to_float(bits);
    for (int64_t index = 0; index < kActivationGroup; ++index) {
      codes[index] = static_cast<uint8_t>(lrintf(values[index] * inverse) + 128);
    }
    *scales++ = zero ? 1.0f : bits_to_float(bits) / 127.0f;
  }
  return true;
}

}  // namespace

const QuantizeKernels quantize_scalar = {absmax_bits, range, to_uint8, to_uint8_channels, to_uint8_groups};

}  // namespace narrowcast
