#include "panel_sum_avx512.h"
#include "weight_only_avx512.h"

namespace narrowcast {
namespace {

typedef __m512 Vector;
constexpr int kTileRows = 4, kTileColumns = 6, kVectorBytes = 64;

inline Vector panel_load(const char* data) { return _mm512_loadu_ps(data); }
inline Vector panel_multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }

}  // namespace
}  // namespace narrowcast

#include "panel_dot.h"

namespace narrowcast {

const WeightOnlyKernels weight_only_avx512vnni = {covers, arranged, arrange, few_rows, dot_panel, nullptr};

}  // namespace narrowcast
