// int8 linear tile, portable body.
#include "float_types.h"
#include "fused.h"
#include "linear.h"

namespace narrowcast {

void int8_tile_scalar(const Int8Linear& problem, Range rows, Range columns, void*) {
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    const int8_t* weight = problem.weight + column * problem.depth;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const uint8_t* codes = problem.codes + row * problem.code_stride;
      int32_t sum = 0;
      for (int64_t k = 0; k < problem.depth; ++k) sum += static_cast<int32_t>(codes[k]) * weight[k];
      float value = static_cast<float>(sum - problem.row_offset[row] * problem.offset[column]) * (problem.row_scale[row] * problem.scale[column]);
      if (problem.bias != nullptr) value += problem.bias[column];
      value = fuse<float, int32_t>(problem.fused, value);
      store_float(problem.out, problem.out_type, row * problem.out_stride + column, value);
    }
  }
}

int64_t int8_scratch_scalar(int64_t) { return 0; }

}  // namespace narrowcast
