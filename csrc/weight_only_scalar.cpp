#include "weight_only.h"
#include "vector16.h"

namespace narrowcast {
namespace {

typedef Float4 Vector;
constexpr int kTileRows = 2, kTileColumns = 4, kVectorBytes = 16;

inline Vector panel_load(const char* data) {
  Vector value;
  memcpy(&value, data, sizeof(value));
  return value;
}

inline Vector panel_multiply_add(Vector a, Vector b, Vector c) { return c + a * b; }
inline float panel_sum(Vector value) { return (value[0] + value[2]) + (value[1] + value[3]); }
bool covers_nothing(const StoredWeight&) { return false; }

}  // namespace
}  // namespace narrowcast

#include "panel_dot.h"

namespace narrowcast {

const WeightOnlyKernels weight_only_scalar = {covers_nothing, nullptr, nullptr, nullptr, dot_panel, nullptr};

}  // namespace narrowcast
