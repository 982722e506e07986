// AVX-512 helpers shared by the *_avx512vnni.cpp files: loads and stores of 16 floats of any element type.
#pragma once

#include <immintrin.h>

#include "kernels.h"

namespace narrowcast {
namespace {

// Mask of the first `count` lanes of 16; all lanes when count >= 16, none when count <= 0.
inline __mmask16 lanes16(int64_t count) {
  return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1u);
}

inline __mmask64 lanes64(int64_t count) {
  return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1ull;
}

template <FloatType type>
inline __m512 load16(const void* data, int64_t index, __mmask16 mask) {
  if constexpr (type == FloatType::float32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(data) + index);
  } else {
    const __m256i half = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(data) + index);
    if constexpr (type == FloatType::float16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
}

inline __m256i to_bfloat16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i result = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  return _mm512_cvtepi32_epi16(result);
}

inline void store16(void* data, FloatType type, int64_t index, __mmask16 mask, __m512 value) {
  if (type == FloatType::float32) {
    float* target = static_cast<float*>(data) + index;
    if (mask == 0xffff) {  // masked stores are slow on some CPUs
      _mm512_storeu_ps(target, value);
    } else {
      _mm512_mask_storeu_ps(target, mask, value);
    }
    return;
  }
  const __m256i half = type == FloatType::bfloat16
                           ? to_bfloat16(value)
                           : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  uint16_t* target = static_cast<uint16_t*>(data) + index;
  if (mask == 0xffff) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), half);
  } else {
    _mm256_mask_storeu_epi16(target, mask, half);
  }
}

}  // namespace
}  // namespace narrowcast
