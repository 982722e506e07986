// int4 linear tile, portable body.
#include "float_types.h"
#include "linear.h"

namespace narrowcast {

void int4_tile_scalar(const Int4Linear& problem, Range rows, Range columns, void*) {
  const int64_t row_bytes = (problem.depth + 1) / 2, blocks = (problem.depth + 31) / 32;
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    const uint8_t* weight = problem.weight + column * row_bytes;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float total = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t group = column * problem.groups + block / problem.blocks_per_group;
        const int8_t* codes = problem.codes + row * problem.code_stride + 32 * block;
        const int64_t bytes = row_bytes - 16 * block < 16 ? row_bytes - 16 * block : 16;
        int32_t sum = 0;
        for (int64_t index = 0; index < bytes; ++index) {
          const int32_t pair = weight[16 * block + index];
          sum += codes[index] * (pair & 15) + codes[16 + index] * (pair >> 4);
        }
        const int32_t zero_point = problem.zero_point != nullptr ? problem.zero_point[group] : 8;
        sum -= zero_point * problem.code_sums[row * problem.block_stride + block];
        const float code_scale = problem.code_scales[row * problem.block_stride + block];
        total += static_cast<float>(sum) * (code_scale * half_to_float(problem.scale[group]));
      }
      if (problem.bias != nullptr) total += problem.bias[column];
      store_float(problem.out, problem.out_type, row * problem.out_stride + column, total);
    }
  }
}

int64_t int4_scratch_scalar(int64_t) { return 0; }

}  // namespace narrowcast
