// Activation quantizers, AVX2: 32 values per step.
#include "quantize.h"

#include "simd_avx2.h"

namespace narrowcast {
namespace {

inline __m256i magnitude_bits(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fffffff));
}

inline uint32_t largest_lane(__m256i value) {
  __m128i half = _mm_max_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4e));
  half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(half));
}

// Four times 8 int32 in -128..255 range of int16 to 32 bytes in order; `pack16` is packs or packus.
#define NARROWCAST_PACK32(pack16, a, b, c, d)                                                                  \
  _mm256_permutevar8x32_epi32(pack16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)),                      \
                              _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))

template <FloatType type>
uint32_t absmax_of(const void* x, int64_t count) {
  __m256i largest = _mm256_setzero_si256();
  int64_t index = 0;
  for (; index + 8 <= count; index += 8) largest = _mm256_max_epi32(largest, magnitude_bits(load8<type>(x, index)));
  if (index < count) largest = _mm256_max_epi32(largest, magnitude_bits(load8_tail<type>(x, index, count - index)));
  return largest_lane(largest);
}

template <FloatType type>
bool range_of(const void* x, int64_t count, float* low, float* high) {
  __m256 least = _mm256_setzero_ps(), most = _mm256_setzero_ps();
  __m256i largest = _mm256_setzero_si256();
  for (int64_t index = 0; index < count; index += 8) {
    const __m256 value = count - index >= 8 ? load8<type>(x, index) : load8_tail<type>(x, index, count - index);
    least = _mm256_min_ps(least, value);
    most = _mm256_max_ps(most, value);
    largest = _mm256_max_epi32(largest, magnitude_bits(value));
  }
  float lows[8], highs[8];
  _mm256_storeu_ps(lows, least);
  _mm256_storeu_ps(highs, most);
  float unused;
  quantize_scalar.range(lows, FloatType::float32, 8, low, &unused);
  quantize_scalar.range(highs, FloatType::float32, 8, &unused, high);
  return largest_lane(largest) < kNonFiniteBits;
}

struct Uint8Step {
  __m256 inverse, low, high;
  __m256i zero_point, largest;

  __m256i codes(__m256 value) {
    largest = _mm256_max_epi32(largest, magnitude_bits(value));
    const __m256 step = _mm256_min_ps(_mm256_max_ps(_mm256_mul_ps(value, inverse), low), high);
    return _mm256_add_epi32(_mm256_cvtps_epi32(step), zero_point);
  }
};

template <FloatType type>
bool uint8_of(const void* x, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  Uint8Step step = {_mm256_set1_ps(inverse), _mm256_set1_ps(static_cast<float>(-zero_point)),
                    _mm256_set1_ps(static_cast<float>(255 - zero_point)), _mm256_set1_epi32(zero_point),
                    _mm256_setzero_si256()};
  int64_t index = 0;
  for (; index + 32 <= count; index += 32) {
    const __m256i a = step.codes(load8<type>(x, index)), b = step.codes(load8<type>(x, index + 8));
    const __m256i c = step.codes(load8<type>(x, index + 16)), d = step.codes(load8<type>(x, index + 24));
    const __m256i bytes = NARROWCAST_PACK32(_mm256_packus_epi16, a, b, c, d);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + index), bytes);
  }
  for (; index < count; index += 8) {
    const int64_t length = count - index < 8 ? count - index : 8;
    int32_t lanes[8];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), step.codes(load8_tail<type>(x, index, length)));
    for (int64_t lane = 0; lane < length; ++lane) codes[index + lane] = static_cast<uint8_t>(lanes[lane]);
  }
  return largest_lane(step.largest) < kNonFiniteBits;
}

// Every channel its own step. Codes beyond -255..255 are beyond 0..255 with any zero point: packing saturates them.
struct ChannelStep {
  const float* inverse;
  const int32_t* zero_point;
  __m256i largest;

  __m256i codes(__m256 value, int64_t index) {
    largest = _mm256_max_epi32(largest, magnitude_bits(value));
    const __m256 scaled = _mm256_mul_ps(value, _mm256_loadu_ps(inverse + index));
    const __m256 step = _mm256_min_ps(_mm256_max_ps(scaled, _mm256_set1_ps(-255.0f)), _mm256_set1_ps(255.0f));
    const __m256i zero = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(zero_point + index));
    return _mm256_add_epi32(_mm256_cvtps_epi32(step), zero);
  }
};

template <FloatType type>
bool channels_of(const void* x, int64_t count, const float* inverse, const int32_t* zero_point, uint8_t* codes) {
  ChannelStep step = {inverse, zero_point, _mm256_setzero_si256()};
  int64_t index = 0;
  for (; index + 32 <= count; index += 32) {
    __m256i parts[4];
    for (int part = 0; part < 4; ++part) {
      parts[part] = step.codes(load8<type>(x, index + 8 * part), index + 8 * part);
    }
    const __m256i bytes = NARROWCAST_PACK32(_mm256_packus_epi16, parts[0], parts[1], parts[2], parts[3]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + index), bytes);
  }
  const void* rest = static_cast<const char*>(x) + index * float_bytes(type);
  const bool finite = quantize_scalar.to_uint8_channels(rest, type, count - index, inverse + index, zero_point + index,
                                                        codes + index);
  return finite && largest_lane(step.largest) < kNonFiniteBits;
}

template <FloatType type>
bool uint8_groups_of(const void* x, int64_t count, uint8_t* codes, float* scales) {
  for (int64_t start = 0; start < count; start += kActivationGroup, codes += kActivationGroup) {
    __m256 values[4];
    __m256i largest = _mm256_setzero_si256();
    for (int part = 0; part < 4; ++part) {
      const int64_t index = start + 8 * part, left = count - index;
      values[part] = left >= 8 ? load8<type>(x, index) : load8_tail<type>(x, index, left);
      largest = _mm256_max_epi32(largest, magnitude_bits(values[part]));
    }
    const uint32_t bits = largest_lane(largest);
    if (bits >= kNonFiniteBits) return false;
    const bool zero = bits < kSmallestRangeBits;
    const __m256 inverse = _mm256_set1_ps(zero ? 0.0f : 127.0f / bits_to_float(bits));
    __m256i steps[4];
    for (int part = 0; part < 4; ++part) steps[part] = _mm256_cvtps_epi32(_mm256_mul_ps(values[part], inverse));
    const __m256i bytes = NARROWCAST_PACK32(_mm256_packs_epi16, steps[0], steps[1], steps[2], steps[3]);
    const __m256i shifted = _mm256_xor_si256(bytes, _mm256_set1_epi8(-128));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), shifted);
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

bool to_uint8(const void* x, FloatType type, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  if (type == FloatType::float32) return uint8_of<FloatType::float32>(x, count, inverse, zero_point, codes);
  if (type == FloatType::bfloat16) return uint8_of<FloatType::bfloat16>(x, count, inverse, zero_point, codes);
  return uint8_of<FloatType::float16>(x, count, inverse, zero_point, codes);
}

bool to_uint8_channels(const void* x, FloatType type, int64_t count, const float* inverse, const int32_t* zero_point,
                       uint8_t* codes) {
  if (type == FloatType::float32) return channels_of<FloatType::float32>(x, count, inverse, zero_point, codes);
  if (type == FloatType::bfloat16) return channels_of<FloatType::bfloat16>(x, count, inverse, zero_point, codes);
  return channels_of<FloatType::float16>(x, count, inverse, zero_point, codes);
}

bool to_uint8_groups(const void* x, FloatType type, int64_t count, uint8_t* codes, float* scales) {
  if (type == FloatType::float32) return uint8_groups_of<FloatType::float32>(x, count, codes, scales);
  if (type == FloatType::bfloat16) return uint8_groups_of<FloatType::bfloat16>(x, count, codes, scales);
  return uint8_groups_of<FloatType::float16>(x, count, codes, scales);
}

}  // namespace

const QuantizeKernels quantize_avx2 = {absmax_bits, range, to_uint8, to_uint8_channels, to_uint8_groups};

}  // namespace narrowcast
