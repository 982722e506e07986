// Low-bit linear tile, portable body.
#include "linear_lowbit.h"

#include "float_types.h"
#include "fused.h"

namespace narrowcast {
namespace {

// Level of field `index` of a packed row, less the zero point.
inline int32_t weight_at(const LowBitLinear& problem, const uint8_t* row, int64_t index, int32_t zero_point) {
  const int64_t bit = index * problem.bits, byte = bit / 8;
  uint32_t word = row[byte];
  if (bit % 8 + problem.bits > 8) word |= static_cast<uint32_t>(row[byte + 1]) << 8;
  uint32_t field = (word >> (bit % 8)) & ((1u << problem.bits) - 1);
  if (problem.bits == 8) field ^= 0x80;
  return static_cast<int32_t>(problem.levels != nullptr ? problem.levels[field] : field) - zero_point;
}

float dot(const LowBitLinear& problem, int64_t row, int64_t column) {
  const uint8_t* weight = problem.weight + column * problem.row_bytes;
  const uint8_t* codes = problem.codes + row * problem.code_stride;
  float total = 0.0f;
  for (int64_t block = 0; block < problem.blocks; ++block) {
    const int64_t group = column * problem.groups + block / problem.blocks_per_group;
    const int32_t mask = (1 << problem.bits) - 1;
    const int32_t zero_point = problem.zero_point != nullptr ? problem.zero_point[group] & mask : problem.zero;
    const int64_t begin = block * problem.block, after = begin + problem.block;
    int32_t sum = 0;
    for (int64_t k = begin; k < (after < problem.depth ? after : problem.depth); ++k) {
      sum += (codes[k] - 128) * weight_at(problem, weight, k, zero_point);
    }
    const float stored = problem.scale_is_half ? half_to_float(static_cast<const uint16_t*>(problem.scale)[group])
                                               : static_cast<const float*>(problem.scale)[group];
    total += static_cast<float>(sum) * (stored * problem.level_scale) *
             problem.code_scales[row * problem.blocks + block];
  }
  return total;
}

}  // namespace

void lowbit_tile_scalar(const LowBitLinear& problem, Range rows, Range columns, void*) {
  for (int64_t column = columns.begin; column < columns.end; ++column) {
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float value = dot(problem, row, column);
      if (problem.bias != nullptr) value += problem.bias[column];
      value = fuse<float, int32_t>(problem.fused, value);
      store_float(problem.out, problem.out_type, row * problem.out_stride + column, value);
    }
  }
}

int64_t lowbit_scratch_scalar(const LowBitLinear&) { return 0; }

}  // namespace narrowcast
