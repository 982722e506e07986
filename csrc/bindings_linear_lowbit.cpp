// Torch binding of the low-bit linear op: packed weights of 2 to 8 bits, activations quantized to int8 per token or per
// group.
#include "linear_lowbit.h"
#include "linear_task.h"
#include "quantize.h"

#include <numeric>
#include <string>

namespace narrowcast {
namespace {

constexpr const char* kOp = "linear_lowbit_dynamic";

// A weight format: bits of a field, the level that means 0.0 in symmetric weights, and what one level is worth.
struct LowBitFormat {
  const char* name;
  int64_t bits;
  uint8_t zero;
  float level_scale;
  const uint8_t* levels;
};

// 127 * level of nf4, rounded, plus 127; twice the level of E2M1, plus 12.
constexpr uint8_t kNf4Levels[16] = {0, 39, 60, 77, 91, 104, 115, 127, 137, 147, 158, 170, 183, 198, 219, 254};
constexpr uint8_t kE2m1Levels[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
constexpr LowBitFormat kFormats[] = {
    {"int2", 2, 2, 1.0f, nullptr},  {"int3", 3, 4, 1.0f, nullptr},
    {"int4", 4, 8, 1.0f, nullptr},  {"uint4", 4, 0, 1.0f, nullptr},
    {"int5", 5, 16, 1.0f, nullptr}, {"int6", 6, 32, 1.0f, nullptr},
    {"int8", 8, 128, 1.0f, nullptr}, {"nf4", 4, 127, 1.0f / 127.0f, kNf4Levels},
    {"fp4_e2m1", 4, 12, 0.5f, kE2m1Levels},
};

const LowBitFormat& find_format(const std::string& name) {
  for (const LowBitFormat& format : kFormats) {
    if (name == format.name) return format;
  }
  fail(kOp, "format '", name, "' is not known; use int2, int3, int4, uint4, int5, int6, int8, nf4 or fp4_e2m1");
}

// How a row of `depth` inputs is cut: `group` inputs share a weight scale, `input_group` an activation scale, `block`
// one integer sum.
struct Cut {
  int64_t group, input_group, block, blocks;
};

Cut cut_depth(int64_t depth, int64_t group, int64_t input_group) {
  NARROWCAST_CHECK(group > 0 && (group % 16 == 0 || group >= depth), kOp,
                   "group must be a multiple of 16 or the number of input features, got ", group);
  NARROWCAST_CHECK(input_group > 0 && (input_group % 16 == 0 || input_group >= depth), kOp,
                   "input_group must be a multiple of 16 or the number of input features, got ", input_group);
  const int64_t whole = round_up(depth > 0 ? depth : 1, 64);
  if (group >= depth) group = whole;
  if (input_group >= depth) input_group = whole;
  int64_t block = whole;
  if (group < depth || input_group < depth) {
    block = std::gcd(std::gcd(group < depth ? group : 128, input_group < depth ? input_group : 128), int64_t{128});
  }
  return {group, input_group, block, depth > 0 ? divide_up(depth, block) : 0};
}

struct Arguments {
  Contiguous weight, scale, zero_point, bias;
  int64_t columns, row_bytes, groups;
  bool scale_is_half, interleaved;
};

// Checks the scales or zero points [columns, groups], or [panels, groups, 16] beside an interleaved weight.
void check_groups(const Tensor& tensor, const Arguments& sizes, const char* name) {
  const int64_t panels = divide_up(sizes.columns, kInterleavedRows);
  if (sizes.interleaved) {
    NARROWCAST_CHECK(tensor.is_cpu() && tensor.dim() == 3 && tensor.size(0) == panels &&
                         tensor.size(1) == sizes.groups && tensor.size(2) == kInterleavedRows,
                     kOp, name, " must have shape [", panels, ", ", sizes.groups, ", ", kInterleavedRows, "], got ",
                     shape_text(tensor));
  } else {
    NARROWCAST_CHECK(
        tensor.is_cpu() && tensor.dim() == 2 && tensor.size(0) == sizes.columns && tensor.size(1) == sizes.groups, kOp,
        name, " must have shape [", sizes.columns, ", ", sizes.groups, "], got ", shape_text(tensor));
  }
}

Arguments read_arguments(const Activations& x, const Tensor& weight, const Tensor& scale,
                         const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias, int64_t group,
                         int64_t bits, int64_t columns) {
  Arguments result{};
  result.interleaved = weight.dim() == 4;
  check_tensor(weight, bits == 8 ? ScalarType::Char : ScalarType::Byte, result.interleaved ? 4 : 2, kOp, "weight");
  result.columns = result.interleaved ? columns : weight.size(0);
  result.row_bytes = divide_up(x.depth * bits, 8), result.groups = divide_up(x.depth, group);
  if (result.interleaved) {
    check_interleaved(weight, {columns, x.depth, bits}, kOp);
  } else {
    NARROWCAST_CHECK(weight.size(1) == result.row_bytes, kOp, "x has ", x.depth,
                     " input features, weight has rows of ", weight.size(1), " bytes");
    NARROWCAST_CHECK(columns == 0 || columns == result.columns, kOp, "columns is ", columns, ", the weight has ",
                     result.columns, " rows");
  }
  // 255 * 128 * depth must fit in int32.
  NARROWCAST_CHECK(x.depth <= 65536, kOp, "more than 65536 input features overflow the int32 sums");
  result.scale_is_half = scale.scalar_type() == ScalarType::Half;
  if (!result.scale_is_half) check_tensor(scale, ScalarType::Float, result.interleaved ? 3 : 2, kOp, "scale");
  check_groups(scale, result, "scale");
  if (zero_point.has_value()) {
    NARROWCAST_CHECK(bits < 8, kOp, "int8 weights take no zero_point");
    check_tensor(*zero_point, ScalarType::Byte, result.interleaved ? 3 : 2, kOp, "zero_point");
    check_groups(*zero_point, result, "zero_point");
    result.zero_point = Contiguous(*zero_point);
  }
  result.weight = Contiguous(weight), result.scale = Contiguous(scale);
  result.bias = Contiguous(bias, result.columns, kOp, "bias");
  return result;
}

// Copies an interleaved weight back into the stored layout, for a tier that reads no other.
void restore(LowBitLinear* problem, int64_t columns) {
  const int64_t scale_bytes = problem->scale_is_half ? 2 : 4, values = columns * problem->groups;
  auto* scale = static_cast<char*>(workspace(Slot::extra, (scale_bytes + 1) * values + columns * problem->row_bytes));
  auto* zero_point = reinterpret_cast<uint8_t*>(scale + scale_bytes * values);
  restore_groups(columns, problem->groups, scale_bytes, problem->scale, scale);
  if (problem->zero_point != nullptr) restore_groups(columns, problem->groups, 1, problem->zero_point, zero_point);
  restore_rows({columns, problem->depth, problem->bits}, problem->weight, zero_point + values);
  problem->scale = scale, problem->weight = zero_point + values;
  if (problem->zero_point != nullptr) problem->zero_point = zero_point;
}

// Codes and block scales of one row; false where a value is not finite.
bool quantize_row(const QuantizeKernels& kernels, const Activations& x, int64_t row, const Cut& cut, int64_t stride,
                  uint8_t* codes, float* scales) {
  const char* values = static_cast<const char*>(x.row(row));
  if (cut.input_group == kActivationGroup && cut.block == kActivationGroup) {
    const int64_t written = cut.blocks * kActivationGroup;
    std::memset(codes + written, 128, static_cast<size_t>(stride - written));
    return kernels.to_uint8_groups(values, x.type, x.depth, codes, scales);
  }
  for (int64_t begin = 0; begin < x.depth; begin += cut.input_group) {
    const int64_t count = x.depth - begin < cut.input_group ? x.depth - begin : cut.input_group;
    const void* part = values + begin * float_bytes(x.type);
    const uint32_t bits = kernels.absmax_bits(part, x.type, count);
    if (bits >= kNonFiniteBits) return false;
    const bool zero = bits < kSmallestRangeBits;
    kernels.to_uint8(part, x.type, count, zero ? 0.0f : 127.0f / bits_to_float(bits), 128, codes + begin);
    const float scale = zero ? 1.0f : bits_to_float(bits) / 127.0f;
    for (int64_t block = begin / cut.block; block * cut.block < begin + count; ++block) scales[block] = scale;
  }
  std::memset(codes + x.depth, 128, static_cast<size_t>(stride - x.depth));
  return true;
}

Tensor linear_lowbit_dynamic(const Tensor& x_tensor, const Tensor& weight, const Tensor& scale,
                             const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias,
                             std::string format_name, int64_t group, int64_t input_group, std::string fused,
                             int64_t columns) {
  const Activations x(x_tensor, kOp);
  const LowBitFormat& format = find_format(format_name);
  const Cut cut = cut_depth(x.depth, group, input_group);
  NARROWCAST_CHECK(format.levels == nullptr || !zero_point.has_value(), kOp, format.name, " takes no zero_point");
  const Arguments arguments = read_arguments(x, weight, scale, zero_point, bias, group, format.bits, columns);
  const Fused activation = find_fused(fused, kOp);
  Tensor out = x.empty_output(arguments.columns);
  if (x.rows == 0 || arguments.columns == 0) return out;
  const int64_t stride = round_up(cut.blocks * cut.block, 64);
  const bool parallel = is_parallel(x.rows, arguments.columns, x.depth);
  auto* codes = static_cast<uint8_t*>(workspace(Slot::codes, x.rows * (stride + 8 * cut.blocks) + 64));
  auto* code_scales = reinterpret_cast<float*>(codes + x.rows * stride);
  auto* code_sums = reinterpret_cast<int32_t*>(code_scales + x.rows * cut.blocks);
  LowBitLinear problem = {.rows = x.rows,
                                .codes = codes,
                                .code_stride = stride,
                                .code_scales = code_scales,
                                .code_sums = code_sums,
                                .weight = arguments.weight.data<uint8_t>(),
                                .row_bytes = arguments.row_bytes,
                                .bits = format.bits,
                                .levels = format.levels,
                                .scale = arguments.scale.data(),
                                .scale_is_half = arguments.scale_is_half,
                                .level_scale = format.level_scale,
                                .zero_point = arguments.zero_point.data<uint8_t>(),
                                .zero = format.zero,
                                .groups = arguments.groups,
                                .blocks_per_group = divide_up(cut.group, cut.block),
                                .block = cut.block,
                                .blocks = cut.blocks,
                                .depth = x.depth,
                                .bias = arguments.bias.data<float>(),
                                .fused = activation,
                                .out = out.mutable_data_ptr(),
                                .out_stride = arguments.columns,
                                .out_type = x.type};
  const LowBitKernels& kernels = kLowBitTiers.active();
  const InterleavedKernels& side_by_side = kLowBitInterleavedTiers.active();
  const bool interleaved = arguments.interleaved && side_by_side.tile != nullptr && cut.block % kChunk == 0;
  if (arguments.interleaved && !interleaved) restore(&problem, arguments.columns);
  const QuantizeKernels& quantize = kQuantizeTiers.active();
  quantize_rows(x, parallel && x.rows * x.depth > 2 * kQuantizeTask, kOp, [&](int64_t row) {
    uint8_t* row_codes = codes + row * stride;
    float* row_scales = code_scales + row * cut.blocks;
    if (interleaved) {
      return side_by_side.row(problem, x.row(row), x.type, cut.input_group, row_codes, row_scales,
                              code_sums + row * cut.blocks);
    }
    if (!quantize_row(quantize, x, row, cut, stride, row_codes, row_scales)) return false;
    if (kernels.order_row != nullptr) kernels.order_row(problem, row_codes);
    return true;
  });
  const auto tile = interleaved ? side_by_side.tile : kernels.tile;
  const int64_t scratch = interleaved ? side_by_side.scratch(problem) : kernels.scratch(problem);
  for_each_tile(x.rows, arguments.columns, parallel, [&](Range rows, Range part) {
    tile(problem, rows, part, workspace(Slot::panel, scratch));
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("linear_lowbit_dynamic", TORCH_BOX(&narrowcast::linear_lowbit_dynamic));
}
