#include "linear_lowbit_body_256.h"

namespace narrowcast {

void lowbit_tile_avx2(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  lowbit_tile(problem, rows, columns, scratch);
}

int64_t lowbit_scratch_avx2(const LowBitLinear& problem) { return lowbit_scratch(problem); }

}  // namespace narrowcast
