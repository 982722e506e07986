// The search for the range of a block with the least squared error; bit for bit kernels/reference_search.py.
#pragma once

#include "encode.h"

namespace narrowcast {

// Sixteen blocks at a time, interleaved: element e of block b is at [e * 16 + b].
struct SearchProblem {
  const float* values;      // [elements, 16]
  const float* importance;  // [elements, 16], or null for 1 everywhere
  int64_t elements;
  CodeBounds range;
  int64_t refinements;
  float* scratch;           // [3, elements, 16]
};

struct SearchKernels {
  // scale and zero_point [16]: the full range's on entry, the best found on return; zero points are whole numbers.
  void (*search)(const SearchProblem& problem, float* scale, float* zero_point);
};

extern const SearchKernels search_scalar;
extern const SearchKernels search_avx2;
extern const SearchKernels search_avx512vnni;

constexpr Tiers<SearchKernels> kSearchTiers = {
    .scalar = &search_scalar,
    .avx2 = NARROWCAST_X86_BODY(search_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(search_avx512vnni),
};

}  // namespace narrowcast
