#include <immintrin.h>

#include "weight_only.h"

namespace narrowcast {
namespace {

typedef __m256 Vector;
constexpr int kTileRows = 3, kTileColumns = 4, kVectorBytes = 32;

inline Vector panel_load(const char* data) { return _mm256_loadu_ps(reinterpret_cast<const float*>(data)); }
inline Vector panel_multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }

inline float panel_sum(Vector value) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

bool covers_nothing(const StoredWeight&) { return false; }

}  // namespace
}  // namespace narrowcast

#include "panel_dot.h"

namespace narrowcast {

const WeightOnlyKernels weight_only_avx2 = {covers_nothing, nullptr, nullptr, nullptr, dot_panel, nullptr};

}  // namespace narrowcast
