// int4 linear tile for the Arm tiers: nibbles are small enough to be signed operands of SDOT. Four columns are unpacked
// once to bytes; then a block of 32 at a time for every row, the four columns in the lanes of one register.
#include "linear.h"

#include <string.h>

#include "simd_neon.h"

namespace narrowcast {
namespace {

constexpr int64_t kColumns = 4;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What the rows share, per block: four columns' nibbles [4][even, odd][16], scales and zero points [4].
struct Columns {
  int8_t* nibbles;
  float* scales;
  int32_t* zero_points;
  int64_t blocks;
};

void unpack(const Int4Linear& problem, int64_t column, int64_t count, const Columns& columns) {
  const int64_t row_bytes = (problem.depth + 1) / 2;
  for (int64_t block = 0; block < columns.blocks; ++block) {
    const int64_t group = block / problem.blocks_per_group, bytes = smaller(16, row_bytes - 16 * block);
    for (int64_t c = 0; c < kColumns; ++c) {
      const int64_t from = column + smaller(c, count - 1), index = from * problem.groups + group;
      uint8_t packed[16] = {};
      memcpy(packed, problem.weight + from * row_bytes + 16 * block, static_cast<size_t>(bytes));
      const uint8x16_t pairs = vld1q_u8(packed);
      int8_t* target = columns.nibbles + (block * kColumns + c) * 32;
      vst1q_s8(target, vreinterpretq_s8_u8(vandq_u8(pairs, vdupq_n_u8(15))));
      vst1q_s8(target + 16, vreinterpretq_s8_u8(vshrq_n_u8(pairs, 4)));
      columns.scales[block * kColumns + c] = half_to_float(problem.scale[index]);
      columns.zero_points[block * kColumns + c] = problem.zero_point != nullptr ? problem.zero_point[index] : 8;
    }
  }
}

float32x4_t dot_row(const Int4Linear& problem, int64_t row, const Columns& columns) {
  const int8_t* codes = problem.codes + row * problem.code_stride;
  const float* code_scales = problem.code_scales + row * problem.block_stride;
  const int32_t* code_sums = problem.code_sums + row * problem.block_stride;
  float32x4_t total = vdupq_n_f32(0.0f);
  for (int64_t block = 0; block < columns.blocks; ++block, codes += 32) {
    const int8x16_t evens = vld1q_s8(codes), odds = vld1q_s8(codes + 16);
    const int8_t* nibbles = columns.nibbles + block * kColumns * 32;
    int32x4_t sums[kColumns];
#pragma GCC unroll 4
    for (int c = 0; c < kColumns; ++c) {
      const int32x4_t even = vdotq_s32(vdupq_n_s32(0), vld1q_s8(nibbles + 32 * c), evens);
      sums[c] = vdotq_s32(even, vld1q_s8(nibbles + 32 * c + 16), odds);
    }
    const int32x4_t sum = vpaddq_s32(vpaddq_s32(sums[0], sums[1]), vpaddq_s32(sums[2], sums[3]));
    const int32x4_t product = vmlsq_n_s32(sum, vld1q_s32(columns.zero_points + block * kColumns), code_sums[block]);
    const float32x4_t step = vmulq_n_f32(vld1q_f32(columns.scales + block * kColumns), code_scales[block]);
    total = vaddq_f32(total, vmulq_f32(vcvtq_f32_s32(product), step));
  }
  return total;
}

}  // namespace

void int4_tile_neondot(const Int4Linear& problem, Range rows, Range range, void* scratch) {
  const int64_t blocks = (problem.depth + 31) / 32;
  auto* nibbles = static_cast<int8_t*>(scratch);
  auto* scales = reinterpret_cast<float*>(nibbles + blocks * 32 * kColumns);
  const Columns columns = {nibbles, scales, reinterpret_cast<int32_t*>(scales + blocks * kColumns), blocks};
  for (int64_t column = range.begin; column < range.end; column += kColumns) {
    const int64_t count = smaller(kColumns, range.end - column);
    unpack(problem, column, count, columns);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      float32x4_t total = dot_row(problem, row, columns);
      if (problem.bias != nullptr) {
        total = vaddq_f32(total, load4_tail<FloatType::float32>(problem.bias, column, count));
      }
      store4(problem.out, problem.out_type, row * problem.out_stride + column, count, total);
    }
  }
}

int64_t int4_scratch_neondot(int64_t depth) { return (depth + 31) / 32 * (32 + 2 * 4) * kColumns; }

}  // namespace narrowcast
