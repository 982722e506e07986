// Activation quantizers, AVX-512: 64 values per step.
#include "quantize.h"

#include "float_types.h"
#include "simd_avx512.h"

namespace narrowcast {
namespace {

inline __m512i magnitude_bits(__m512 value) {
  return _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fffffff));
}

template <FloatType type>
uint32_t absmax_of(const void* x, int64_t count) {
  __m512i largest[4] = {};
  int64_t index = 0;
  for (; index + 64 <= count; index += 64) {
    for (int part = 0; part < 4; ++part) {
      largest[part] = _mm512_max_epi32(largest[part], magnitude_bits(load16<type>(x, index + 16 * part, 0xffff)));
    }
  }
  for (; index < count; index += 16) {
    largest[0] = _mm512_max_epi32(largest[0], magnitude_bits(load16<type>(x, index, lanes16(count - index))));
  }
  largest[0] = _mm512_max_epi32(_mm512_max_epi32(largest[0], largest[1]), _mm512_max_epi32(largest[2], largest[3]));
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(largest[0]));
}

template <FloatType type>
bool range_of(const void* x, int64_t count, float* low, float* high) {
  __m512 least[2] = {}, most[2] = {};
  __m512i largest[2] = {};
  for (int64_t index = 0; index < count; index += 32) {
    for (int part = 0; part < 2; ++part) {
      const int64_t at = index + 16 * part;
      const __m512 value = load16<type>(x, at, lanes16(count - at));
      least[part] = _mm512_min_ps(least[part], value);
      most[part] = _mm512_max_ps(most[part], value);
      largest[part] = _mm512_max_epi32(largest[part], magnitude_bits(value));
    }
  }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(least[0], least[1]));
  *high = _mm512_reduce_max_ps(_mm512_max_ps(most[0], most[1]));
  const __m512i both = _mm512_max_epi32(largest[0], largest[1]);
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(both)) < kNonFiniteBits;
}

struct Uint8Step {
  __m512 inverse, low, high;
  __m512i zero_point, largest;

  __m512i codes(__m512 value) {
    largest = _mm512_max_epi32(largest, magnitude_bits(value));
    const __m512 step = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(value, inverse), low), high);
    return _mm512_add_epi32(_mm512_cvtps_epi32(step), zero_point);
  }
};

template <FloatType type>
bool uint8_of(const void* x, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  Uint8Step step = {_mm512_set1_ps(inverse), _mm512_set1_ps(static_cast<float>(-zero_point)),
                    _mm512_set1_ps(static_cast<float>(255 - zero_point)), _mm512_set1_epi32(zero_point),
                    _mm512_setzero_si512()};
  // packs works inside 128-bit lanes: this permutation restores the order of the 16 dwords.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t index = 0;
  for (; index + 64 <= count; index += 64) {
    const __m512i first = _mm512_packs_epi32(step.codes(load16<type>(x, index, 0xffff)),
                                             step.codes(load16<type>(x, index + 16, 0xffff)));
    const __m512i second = _mm512_packs_epi32(step.codes(load16<type>(x, index + 32, 0xffff)),
                                              step.codes(load16<type>(x, index + 48, 0xffff)));
    _mm512_storeu_si512(codes + index, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(first, second)));
  }
  for (; index < count; index += 16) {
    const __mmask16 mask = lanes16(count - index);
    _mm512_mask_cvtepi32_storeu_epi8(codes + index, mask, step.codes(load16<type>(x, index, mask)));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(step.largest)) < kNonFiniteBits;
}

// Every channel its own step. Codes beyond -255..255 are beyond 0..255 with any zero point: packing saturates them.
struct ChannelStep {
  const float* inverse;
  const int32_t* zero_point;
  __m512i largest;

  __m512i codes(__m512 value, int64_t index, __mmask16 mask) {
    largest = _mm512_max_epi32(largest, magnitude_bits(value));
    const __m512 scaled = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(mask, inverse + index));
    const __m512 step = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-255.0f)), _mm512_set1_ps(255.0f));
    return _mm512_add_epi32(_mm512_cvtps_epi32(step), _mm512_maskz_loadu_epi32(mask, zero_point + index));
  }
};

template <FloatType type>
bool channels_of(const void* x, int64_t count, const float* inverse, const int32_t* zero_point, uint8_t* codes) {
  ChannelStep step = {inverse, zero_point, _mm512_setzero_si512()};
  for (int64_t index = 0; index < count; index += 16) {
    const __mmask16 mask = lanes16(count - index);
    const __m512i values = step.codes(load16<type>(x, index, mask), index, mask);
    _mm512_mask_cvtusepi32_storeu_epi8(codes + index, mask, _mm512_max_epi32(values, _mm512_setzero_si512()));
  }
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(step.largest)) < kNonFiniteBits;
}

template <FloatType type>
bool uint8_groups_of(const void* x, int64_t count, uint8_t* codes, float* scales) {
  for (int64_t start = 0; start < count; start += kActivationGroup, codes += kActivationGroup) {
    const __m512 low = load16<type>(x, start, lanes16(count - start));
    const __m512 high = load16<type>(x, start + 16, lanes16(count - start - 16));
    const auto bits =
        static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(magnitude_bits(low), magnitude_bits(high))));
    if (bits >= kNonFiniteBits) return false;
    const bool zero = bits < kSmallestRangeBits;
    const __m512 inverse = _mm512_set1_ps(zero ? 0.0f : 127.0f / bits_to_float(bits));
    const __m512i low_codes = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
    const __m512i high_codes = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
    const __m256i joined = _mm256_set_m128i(_mm512_cvtepi32_epi8(high_codes), _mm512_cvtepi32_epi8(low_codes));
    const __m256i shifted = _mm256_xor_si256(joined, _mm256_set1_epi8(-128));
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

const QuantizeKernels quantize_avx512vnni = {absmax_bits, range, to_uint8, to_uint8_channels, to_uint8_groups};

}  // namespace narrowcast
