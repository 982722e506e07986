// Panels of bfloat16 for bfloat16 inputs: two products per lane and instruction. Runs beside the AVX-512 VNNI tier where
// the processor has AVX-512 BF16.
#include <immintrin.h>
#include <string.h>

#include "weight_only.h"
#include "panel_sum_avx512.h"
#include "weight_only_words.h"

namespace narrowcast {
namespace {

typedef __m512 Vector;
constexpr int kTileRows = 4, kTileColumns = 6, kVectorBytes = 64;

inline Vector panel_load(const char* data) { return _mm512_loadu_ps(data); }

inline Vector panel_multiply_add(Vector a, Vector b, Vector c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}


void to_bfloat16_panel(const float* values, int64_t count, int64_t depth, void* panel) {
  auto* target = static_cast<char*>(panel);
  for (int64_t at = 0; at < depth / 2; at += 16) {
    const int64_t left = count - at;
    const __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : static_cast<__mmask16>((1u << left) - 1u);
    const __m256bh half = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, values + at));
    memcpy(target + 2 * at, &half, 32);
  }
}

}  // namespace
}  // namespace narrowcast

#include "panel_dot.h"

namespace narrowcast {

const WeightOnlyKernels weight_only_avx512bf16 = {covers, arranged, arrange, few_rows, dot_panel, to_bfloat16_panel};

}  // namespace narrowcast
