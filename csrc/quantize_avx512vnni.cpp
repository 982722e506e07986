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

// Finds NaNs and infinities: their product with 0 is a NaN, and a NaN in a sum stays.
struct FiniteCheck {
  __m512 sum = _mm512_setzero_ps();

  void add(__m512 value) { sum = _mm512_fmadd_ps(value, _mm512_setzero_ps(), sum); }
  bool passed() const { return _mm512_cmp_ps_mask(sum, sum, _CMP_UNORD_Q) == 0; }
};

template <FloatType type>
bool range_of(const void* x, int64_t count, float* low, float* high) {
  __m512 least[4] = {}, most[4] = {};
  FiniteCheck check[2];
  int64_t index = 0;
  for (; index + 64 <= count; index += 64) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512 value = load16<type>(x, index + 16 * part, 0xffff);
      least[part] = _mm512_min_ps(least[part], value);
      most[part] = _mm512_max_ps(most[part], value);
      check[part % 2].add(value);
    }
  }
  for (; index < count; index += 16) {
    const __m512 value = load16<type>(x, index, lanes16(count - index));
    least[0] = _mm512_min_ps(least[0], value);
    most[0] = _mm512_max_ps(most[0], value);
    check[0].add(value);
  }
  *low = _mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(least[0], least[1]), _mm512_min_ps(least[2], least[3])));
  *high = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
  return check[0].passed() && check[1].passed();
}

// Packs works inside 128-bit lanes: this restores the order of the 16 dwords. Saturates to 0..255.
inline __m512i pack64(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d)));
}

// rne(value * inverse) + zero_point, saturated to 0..255 by what packs it. Only steps too large for an int32 have to be
// bounded before: too small ones become INT_MIN, which stays negative.
inline __m512i step_of(__m512 value, __m512 inverse, __m512i zero_point) {
  const __m512 step = _mm512_min_ps(_mm512_mul_ps(value, inverse), _mm512_set1_ps(256.0f));
  return _mm512_add_epi32(_mm512_cvtps_epi32(step), zero_point);
}

inline void store_codes(uint8_t* codes, __mmask16 mask, __m512i steps) {
  _mm512_mask_cvtusepi32_storeu_epi8(codes, mask, _mm512_max_epi32(steps, _mm512_setzero_si512()));
}

template <FloatType type>
bool uint8_of(const void* x, int64_t count, float inverse, int32_t zero_point, uint8_t* codes) {
  const __m512 factor = _mm512_set1_ps(inverse);
  const __m512i zero = _mm512_set1_epi32(zero_point);
  FiniteCheck check[2];
  int64_t index = 0;
  for (; index + 64 <= count; index += 64) {
    __m512i steps[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m512 value = load16<type>(x, index + 16 * part, 0xffff);
      check[part % 2].add(value);
      steps[part] = step_of(value, factor, zero);
    }
    _mm512_storeu_si512(codes + index, pack64(steps[0], steps[1], steps[2], steps[3]));
  }
  for (; index < count; index += 16) {
    const __mmask16 mask = lanes16(count - index);
    const __m512 value = load16<type>(x, index, mask);
    check[0].add(value);
    store_codes(codes + index, mask, step_of(value, factor, zero));
  }
  return check[0].passed() && check[1].passed();
}

template <FloatType type>
bool channels_of(const void* x, int64_t count, const float* inverse, const int32_t* zero_point, uint8_t* codes) {
  FiniteCheck check[2];
  int64_t index = 0;
  for (; index + 64 <= count; index += 64) {
    __m512i steps[4];
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const int64_t at = index + 16 * part;
      const __m512 value = load16<type>(x, at, 0xffff);
      check[part % 2].add(value);
      steps[part] = step_of(value, _mm512_loadu_ps(inverse + at), _mm512_loadu_si512(zero_point + at));
    }
    _mm512_storeu_si512(codes + index, pack64(steps[0], steps[1], steps[2], steps[3]));
  }
  for (; index < count; index += 16) {
    const __mmask16 mask = lanes16(count - index);
    const __m512 value = load16<type>(x, index, mask);
    check[0].add(value);
    store_codes(codes + index, mask, step_of(value, _mm512_maskz_loadu_ps(mask, inverse + index),
                                             _mm512_maskz_loadu_epi32(mask, zero_point + index)));
  }
  return check[0].passed() && check[1].passed();
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
