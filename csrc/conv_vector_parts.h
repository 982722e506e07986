// Loads and stores of vectors that may end early, on top of any conv_vector_*.h.
#pragma once

namespace narrowcast {
namespace {

NC_INLINE Float load_up_to(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_part(p, n); }
NC_INLINE void store_up_to(float* p, int64_t n, Float v) { n >= kLanes ? store(p, v) : store_part(p, n, v); }

}  // namespace
}  // namespace narrowcast
