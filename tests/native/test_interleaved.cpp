// Linear tiles on interleaved weights against the scalar tier on the same weights copied back into rows.
#include "check.h"
#include "float_types.h"
#include "interleaved.h"
#include "linear.h"
#include "linear_lowbit.h"
#include "quantize.h"

namespace narrowcast::test {
namespace {

constexpr uint8_t kLevels[16] = {0, 39, 60, 77, 91, 104, 115, 127, 137, 147, 158, 170, 183, 198, 219, 254};

struct Shape {
  int64_t rows, columns, depth;
  FloatType type;

  int64_t out_bytes() const { return rows * columns * float_bytes(type); }
  std::string text(const char* kernel, int64_t bits) const {
    return std::string(kernel) + " rows " + std::to_string(rows) + " columns " + std::to_string(columns) + " depth " +
           std::to_string(depth) + " bits " + std::to_string(bits) + " type " + std::to_string(static_cast<int>(type));
  }
};

Shape random_shape(Random& random) {
  return {random.between(1, random.chance(30) ? 40 : 9), random.between(1, random.chance(30) ? 150 : 40),
          random.between(1, random.chance(30) ? 600 : 90), static_cast<FloatType>(random.between(0, 2))};
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void int8_layer(Random& random) {
  const Shape shape = random_shape(random);
  const Interleaved layout = {shape.columns, shape.depth, 8};
  const int64_t stride = round_up(shape.depth, 64);
  Buffer<uint8_t> codes(shape.rows * stride), weight(layout.panels() * layout.panel_bytes());
  Buffer<float> row_scale(shape.rows), scale(shape.columns), bias(shape.columns);
  Buffer<int32_t> row_offset(shape.rows), offset(shape.columns);
  codes.fill([&] { return random.extreme(0, 255); });
  weight.fill([&] { return random.extreme(0, 255); });
  // what lies behind a row is never used: the layout has zeros there
  for (int64_t index = 0; index < weight.size(); ++index) {
    const int64_t in_panel = index % layout.panel_bytes(), row = index / layout.panel_bytes() * 16 + in_panel % 64 / 4;
    if (in_panel / 64 * 4 + in_panel % 4 >= shape.depth || row >= shape.columns) weight[index] = 0;
  }
  row_scale.fill([&] { return random.unit(); });
  scale.fill([&] { return random.unit() * 0.01f; });
  bias.fill([&] { return random.value(); });
  row_offset.fill([&] { return random.extreme(0, 255); });
  offset.fill([&] { return random.between(-30000, 30000); });
  same_on_every_tier(shape.text("int8 interleaved", 8), shape.out_bytes(), [&](uint8_t* out) {
    const LinearKernels& kernels = kLinearTiers.active();
    Int8Linear problem{};
    problem.codes = codes.data(), problem.code_stride = stride;
    problem.row_scale = row_scale.data(), problem.row_offset = row_offset.data();
    problem.weight = reinterpret_cast<const int8_t*>(weight.data()), problem.scale = scale.data();
    problem.offset = offset.data(), problem.bias = bias.data(), problem.depth = shape.depth, problem.out = out;
    problem.out_stride = shape.columns, problem.out_type = shape.type;
    if (kernels.int8_interleaved != nullptr) {
      Buffer<uint8_t> own(int8_interleaved_scratch(shape.depth));
      return kernels.int8_interleaved(problem, {0, shape.rows}, {0, shape.columns}, own.data());
    }
    Buffer<uint8_t> stored(shape.columns * shape.depth), scratch(kernels.int8_scratch(shape.depth));
    restore_rows(layout, weight.data(), stored.data());
    problem.weight = reinterpret_cast<const int8_t*>(stored.data());
    kernels.int8_tile(problem, {0, shape.rows}, {0, shape.columns}, scratch.data());
  });
}

// What the binding does for weights as they are stored: every group of inputs by itself.
void quantize_groups(const LowBitLinear& problem, const void* x, FloatType type, int64_t input_group, uint8_t* codes,
                     float* scales) {
  const QuantizeKernels& kernels = kQuantizeTiers.active();
  std::memset(codes, 128, static_cast<size_t>(problem.code_stride));
  for (int64_t begin = 0; begin < problem.depth; begin += input_group) {
    const int64_t count = problem.depth - begin < input_group ? problem.depth - begin : input_group;
    const void* part = static_cast<const char*>(x) + begin * float_bytes(type);
    const uint32_t bits = kernels.absmax_bits(part, type, count);
    const bool zero = bits < kSmallestRangeBits;
    kernels.to_uint8(part, type, count, zero ? 0.0f : 127.0f / bits_to_float(bits), 128, codes + begin);
    for (int64_t block = begin / problem.block; block * problem.block < begin + count; ++block) {
      scales[block] = zero ? 1.0f : bits_to_float(bits) / 127.0f;
    }
  }
}

void lowbit_layer(Random& random) {
  constexpr int64_t kBits[] = {2, 3, 4, 5, 6, 8};
  const Shape shape = random_shape(random);
  LowBitLinear problem{};
  problem.rows = shape.rows, problem.depth = shape.depth, problem.bits = kBits[random.between(0, 5)];
  problem.row_bytes = (shape.depth * problem.bits + 7) / 8;
  problem.levels = problem.bits == 4 && random.chance(30) ? kLevels : nullptr;
  problem.level_scale = problem.levels != nullptr ? 1.0f / 127.0f : 1.0f;
  problem.zero = static_cast<uint8_t>(problem.levels ? 127 : random.chance(50) ? 1 << (problem.bits - 1) : problem.bits == 8 ? 128 : 0);
  problem.scale_is_half = random.chance(50);
  const bool whole = random.chance(20);
  problem.block = whole ? round_up(shape.depth, 64) : int64_t{32} << random.between(0, 2);
  problem.blocks = (shape.depth + problem.block - 1) / problem.block;
  const int64_t input_group = whole ? problem.block : problem.block * random.between(1, 3);
  problem.blocks_per_group = random.between(1, 3);
  problem.groups = (problem.blocks + problem.blocks_per_group - 1) / problem.blocks_per_group;
  problem.code_stride = round_up(problem.blocks * problem.block, 64);
  const Interleaved layout = {shape.columns, shape.depth, problem.bits};
  const int64_t scale_bytes = problem.scale_is_half ? 2 : 4, values = layout.panels() * 16 * problem.groups;
  Buffer<uint8_t> weight(layout.panels() * layout.panel_bytes()), scale(values * scale_bytes), zero_point(values);
  Buffer<uint8_t> x(shape.rows * shape.depth * float_bytes(shape.type));
  Buffer<float> bias(shape.columns);
  weight.fill([&] { return random.chance(20) ? 0xff : random.between(0, 255); });
  zero_point.fill([&] { return random.between(0, 255); });
  bias.fill([&] { return random.value(); });
  for (int64_t index = 0; index < values; ++index) {
    store_float(scale.data(), problem.scale_is_half ? FloatType::float16 : FloatType::float32, index,
                random.unit() * 0.01f);
  }
  for (int64_t index = 0; index < shape.rows * shape.depth; ++index) {
    store_float(x.data(), shape.type, index, random.value());
  }
  const bool asymmetric = problem.bits < 8 && problem.levels == nullptr && random.chance(50);
  problem.bias = bias.data(), problem.out_stride = shape.columns, problem.out_type = shape.type;
  same_on_every_tier(shape.text("low bits interleaved", problem.bits), shape.out_bytes(), [&](uint8_t* out) {
    const LowBitKernels& kernels = kLowBitTiers.active();
    Buffer<uint8_t> codes(shape.rows * problem.code_stride), stored(shape.columns * problem.row_bytes);
    Buffer<float> code_scales(shape.rows * problem.blocks);
    Buffer<int32_t> code_sums(shape.rows * problem.blocks);
    Buffer<uint8_t> stored_scale(shape.columns * problem.groups * scale_bytes), stored_zero(shape.columns * problem.groups);
    LowBitLinear run = problem;
    run.codes = codes.data(), run.code_scales = code_scales.data(), run.code_sums = code_sums.data(), run.out = out;
    run.weight = weight.data(), run.scale = scale.data(), run.zero_point = asymmetric ? zero_point.data() : nullptr;
    const InterleavedKernels& side_by_side = kLowBitInterleavedTiers.active();
    const bool interleaved = side_by_side.tile != nullptr;
    for (int64_t row = 0; row < shape.rows; ++row) {
      const uint8_t* values_of_row = x.data() + row * shape.depth * float_bytes(shape.type);
      uint8_t* row_codes = codes.data() + row * problem.code_stride;
      float* scales = code_scales.data() + row * problem.blocks;
      if (interleaved) {
        side_by_side.row(run, values_of_row, shape.type, input_group, row_codes, scales,
                         code_sums.data() + row * problem.blocks);
        continue;
      }
      quantize_groups(run, values_of_row, shape.type, input_group, row_codes, scales);
      if (kernels.order_row != nullptr) kernels.order_row(run, row_codes);
    }
    Buffer<uint8_t> own(interleaved ? side_by_side.scratch(run) : 0);
    if (interleaved) return side_by_side.tile(run, {0, shape.rows}, {0, shape.columns}, own.data());
    restore_rows(layout, weight.data(), stored.data());
    restore_groups(shape.columns, problem.groups, scale_bytes, scale.data(), stored_scale.data());
    restore_groups(shape.columns, problem.groups, 1, zero_point.data(), stored_zero.data());
    run.weight = stored.data(), run.scale = stored_scale.data();
    run.zero_point = asymmetric ? stored_zero.data() : nullptr;
    Buffer<uint8_t> scratch(kernels.scratch(run));
    kernels.tile(run, {0, shape.rows}, {0, shape.columns}, scratch.data());
  });
}

}  // namespace

void test_interleaved(Random& random) {
  int8_layer(random);
  lowbit_layer(random);
}

}  // namespace narrowcast::test
