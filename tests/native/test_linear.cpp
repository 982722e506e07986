// Linear tiles: any size, extreme codes and weights, parts of the output, every element type.
#include "check.h"
#include "float_types.h"
#include "linear.h"

namespace narrowcast::test {
namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Size {
  int64_t rows, columns, depth;
  FloatType type;
  Range row_range, column_range;

  std::string text(const char* kernel) const {
    return std::string(kernel) + " rows " + std::to_string(rows) + " columns " + std::to_string(columns) + " depth " +
           std::to_string(depth) + " type " + std::to_string(static_cast<int>(type));
  }
  int64_t out_bytes() const { return rows * columns * float_bytes(type); }
};

Size random_size(Random& random) {
  Size size{};
  size.rows = random.between(1, random.chance(30) ? 40 : 9);
  size.columns = random.between(1, random.chance(30) ? 150 : 40);
  size.depth = random.between(random.chance(3) ? 0 : 1, random.chance(30) ? 300 : 70);
  size.type = static_cast<FloatType>(random.between(0, 2));
  size.row_range = {random.between(0, size.rows - 1), size.rows};
  // A task begins at a multiple of the column tile.
  size.column_range = {random.between(0, (size.columns - 1) / kColumnTile) * kColumnTile, size.columns};
  return size;
}

}  // namespace

void test_linear_int8(Random& random) {
  const Size size = random_size(random);
  const int64_t stride = round_up(size.depth > 0 ? size.depth : 1, 64);
  Buffer<uint8_t> codes(size.rows * stride);
  Buffer<int8_t> weight(size.columns * size.depth);
  Buffer<float> row_scale(size.rows), scale(size.columns), bias(size.columns);
  Buffer<int32_t> row_offset(size.rows), offset(size.columns);
  codes.fill([&] { return random.extreme(0, 255); });
  weight.fill([&] { return random.extreme(-128, 127); });
  row_scale.fill([&] { return random.unit(); });
  scale.fill([&] { return random.unit() * 0.01f; });
  bias.fill([&] { return random.value(); });
  row_offset.fill([&] { return random.extreme(0, 255); });
  offset.fill([&] { return random.between(-30000, 30000); });
  same_on_every_tier(size.text("linear_int8"), size.out_bytes(), [&](uint8_t* out) {
    const LinearKernels& kernels = kLinearTiers.active();
    Int8Linear problem{};
    problem.codes = codes.data(), problem.code_stride = stride;
    problem.row_scale = row_scale.data(), problem.row_offset = row_offset.data();
    problem.weight = weight.data(), problem.scale = scale.data(), problem.offset = offset.data();
    problem.bias = size.rows % 3 == 0 ? nullptr : bias.data();
    problem.depth = size.depth, problem.out = out, problem.out_stride = size.columns, problem.out_type = size.type;
    Buffer<uint8_t> scratch(kernels.int8_scratch(size.depth));
    kernels.int8_tile(problem, size.row_range, size.column_range, scratch.data());
  });
}

void test_linear_int4(Random& random) {
  const Size size = random_size(random);
  const int64_t blocks = round_up(size.depth > 0 ? size.depth : 1, 128) / 32, used = (size.depth + 31) / 32;
  const int64_t blocks_per_group = random.between(1, 4), groups = used > 0 ? (used + blocks_per_group - 1) / blocks_per_group : 1;
  Buffer<int8_t> codes(size.rows * blocks * 32);
  Buffer<float> code_scales(size.rows * blocks), bias(size.columns);
  Buffer<int32_t> code_sums(size.rows * blocks);
  Buffer<uint8_t> weight(size.columns * ((size.depth + 1) / 2)), zero_point(size.columns * groups);
  Buffer<uint16_t> scale(size.columns * groups);
  for (int64_t row = 0; row < size.rows; ++row) {
    for (int64_t block = 0; block < blocks; ++block) {
      int32_t sum = 0;
      for (int64_t k = 0; k < 32; ++k) {
        // Even elements first; what lies behind the row is zero.
        const int64_t element = 32 * block + (k % 16) * 2 + k / 16;
        const int64_t code = element < size.depth ? random.extreme(-127, 127) : 0;
        codes[(row * blocks + block) * 32 + k] = static_cast<int8_t>(code);
        sum += static_cast<int32_t>(code);
      }
      code_sums[row * blocks + block] = sum;
      code_scales[row * blocks + block] = block < used ? random.unit() + 1e-3f : 0.0f;
    }
  }
  weight.fill([&] { return random.chance(20) ? 0xff : random.between(0, 255); });
  zero_point.fill([&] { return random.extreme(0, 15); });
  scale.fill([&] { return float_to_half(random.unit() * 0.1f); });
  bias.fill([&] { return random.value(); });
  same_on_every_tier(size.text("linear_int4"), size.out_bytes(), [&](uint8_t* out) {
    const LinearKernels& kernels = kLinearTiers.active();
    Int4Linear problem{};
    problem.codes = codes.data(), problem.code_stride = blocks * 32;
    problem.code_scales = code_scales.data(), problem.code_sums = code_sums.data(), problem.block_stride = blocks;
    problem.weight = weight.data(), problem.scale = scale.data();
    problem.zero_point = size.columns % 2 == 0 ? nullptr : zero_point.data();
    problem.groups = groups, problem.blocks_per_group = blocks_per_group;
    problem.bias = size.rows % 3 == 0 ? nullptr : bias.data();
    problem.depth = size.depth, problem.out = out, problem.out_stride = size.columns, problem.out_type = size.type;
    Buffer<uint8_t> scratch(kernels.int4_scratch(size.depth));
    kernels.int4_tile(problem, size.row_range, size.column_range, scratch.data());
  });
}

}  // namespace narrowcast::test
