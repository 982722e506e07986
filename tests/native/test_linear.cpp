// Linear tiles: any size, extreme codes and weights, parts of the output, every element type.
#include "check.h"
#include "float_types.h"
#include "linear.h"
#include "linear_lowbit.h"

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
  const auto fused = static_cast<Fused>(random.chance(50) ? 0 : random.between(1, 4));
  same_on_every_tier(size.text("linear_int8"), size.out_bytes(), [&](uint8_t* out) {
    const LinearKernels& kernels = kLinearTiers.active();
    Int8Linear problem{};
    problem.codes = codes.data(), problem.code_stride = stride;
    problem.row_scale = row_scale.data(), problem.row_offset = row_offset.data();
    problem.weight = weight.data(), problem.scale = scale.data(), problem.offset = offset.data();
    problem.bias = size.rows % 3 == 0 ? nullptr : bias.data();
    problem.fused = fused, problem.depth = size.depth, problem.out = out, problem.out_stride = size.columns, problem.out_type = size.type;
    Buffer<uint8_t> scratch(kernels.int8_scratch(size.depth));
    kernels.int8_tile(problem, size.row_range, size.column_range, scratch.data());
  });
}

namespace {

constexpr uint8_t kNf4Levels[16] = {0, 39, 60, 77, 91, 104, 115, 127, 137, 147, 158, 170, 183, 198, 219, 254};

// A format and how its rows are cut into blocks and groups.
LowBitLinear random_cut(Random& random, int64_t depth) {
  constexpr int64_t kBits[] = {2, 3, 4, 5, 6, 8};
  LowBitLinear problem{};
  problem.bits = kBits[random.between(0, 5)], problem.depth = depth;
  problem.row_bytes = (depth * problem.bits + 7) / 8;
  problem.levels = problem.bits == 4 && random.chance(30) ? kNf4Levels : nullptr;
  problem.zero = static_cast<uint8_t>(problem.levels ? 127 : problem.bits == 8 ? 128 : random.between(0, 1) << (problem.bits - 1));
  problem.level_scale = problem.levels ? 1.0f / 127.0f : 1.0f;
  problem.scale_is_half = random.chance(50);
  const bool whole = random.chance(20);
  problem.block = whole ? round_up(depth > 0 ? depth : 1, 64) : int64_t{16} << random.between(0, 3);
  problem.blocks = (depth + problem.block - 1) / problem.block;
  problem.blocks_per_group = random.between(1, 3);
  problem.groups = (problem.blocks + problem.blocks_per_group - 1) / problem.blocks_per_group;
  problem.code_stride = round_up(problem.blocks * problem.block, 64);
  return problem;
}

}  // namespace

void test_linear_lowbit(Random& random) {
  const Size size = random_size(random);
  LowBitLinear problem = random_cut(random, size.depth);
  Buffer<uint8_t> codes(size.rows * problem.code_stride), weight(size.columns * problem.row_bytes);
  Buffer<uint8_t> zero_point(size.columns * problem.groups);
  Buffer<float> code_scales(size.rows * problem.blocks), bias(size.columns);
  Buffer<uint8_t> scale(size.columns * problem.groups * (problem.scale_is_half ? 2 : 4));
  for (int64_t index = 0; index < codes.size(); ++index) {
    // A symmetric code is never 0; 128 stands for 0 and behind the row.
    codes[index] = index % problem.code_stride < size.depth ? static_cast<uint8_t>(random.extreme(1, 255)) : 128;
  }
  weight.fill([&] { return random.chance(20) ? 0xff : random.between(0, 255); });
  zero_point.fill([&] { return random.between(0, 255); });
  code_scales.fill([&] { return random.unit() + 1e-3f; });
  bias.fill([&] { return random.value(); });
  for (int64_t index = 0; index < size.columns * problem.groups; ++index) {
    store_float(scale.data(), problem.scale_is_half ? FloatType::float16 : FloatType::float32, index,
                random.unit() * 0.01f);
  }
  problem.rows = size.rows, problem.code_scales = code_scales.data(), problem.weight = weight.data();
  problem.scale = scale.data(), problem.out_stride = size.columns, problem.out_type = size.type;
  const bool asymmetric = problem.bits < 8 && problem.levels == nullptr && random.chance(50);
  problem.zero_point = asymmetric ? zero_point.data() : nullptr;
  problem.bias = random.chance(70) ? bias.data() : nullptr;
  problem.fused = static_cast<Fused>(random.chance(50) ? 0 : random.between(1, 4));
  const std::string what = size.text("linear_lowbit") + " bits " + std::to_string(problem.bits) + " block " +
                           std::to_string(problem.block) + " fused " + std::to_string(static_cast<int>(problem.fused));
  same_on_every_tier(what, size.out_bytes(), [&](uint8_t* out) {
    const LowBitKernels& kernels = kLowBitTiers.active();
    Buffer<uint8_t> ordered(codes.size());
    std::memcpy(ordered.data(), codes.data(), static_cast<size_t>(codes.size()));
    problem.codes = ordered.data(), problem.out = out;
    for (int64_t row = 0; kernels.order_row != nullptr && row < size.rows; ++row) {
      kernels.order_row(problem, ordered.data() + row * problem.code_stride);
    }
    Buffer<uint8_t> scratch(kernels.scratch(problem));
    kernels.tile(problem, size.row_range, size.column_range, scratch.data());
  });
}

}  // namespace narrowcast::test
