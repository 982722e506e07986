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
  bool scale_is_half;
};

Arguments read_arguments(const Activations& x, const Tensor& weight, const Tensor& scale,
                         const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias, int64_t group,
                         int64_t bits) {
  check_tensor(weight, bits == 8 ? ScalarType::Char : ScalarType::Byte, 2, kOp, "weight");
  const int64_t columns = weight.size(0), row_bytes = divide_up(x.depth * bits, 8), groups = divide_up(x.depth, group);
  NARROWCAST_CHECK(weight.size(1) == row_bytes, kOp, "x has ", x.depth, " input features, weight has rows of ",
                   weight.size(1), " bytes");
  // 255 * 128 * depth must fit in int32.
  NARROWCAST_CHECK(x.depth <= 65536, kOp, "more than 65536 input features overflow the int32 sums");
  const bool half = scale.scalar_type() == ScalarType::Half;
  if (!half) check_tensor(scale, ScalarType::Float, 2, kOp, "scale");
  NARROWCAST_CHECK(scale.is_cpu() && scale.dim() == 2 && scale.size(0) == columns && scale.size(1) == groups, kOp,
                   "scale must have shape [", columns, ", ", groups, "], got ", shape_text(scale));
  if (zero_point.has_value()) {
    NARROWCAST_CHECK(bits < 8, kOp, "int8 weights take no zero_point");
    check_tensor(*zero_point, ScalarType::Byte, 2, kOp, "zero_point");
    NARROWCAST_CHECK(zero_point->size(0) == columns && zero_point->size(1) == groups, kOp,
                     "zero_point must have shape [", columns, ", ", groups, "], got ", shape_text(*zero_point));
  }
  return {Contiguous(weight),
          Contiguous(scale),
          zero_point.has_value() ? Contiguous(*zero_point) : Contiguous(),
          Contiguous(bias, columns, kOp, "bias"),
          columns,
          row_bytes,
          groups,
          half};
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
                             std::string format_name, int64_t group, int64_t input_group, std::string fused) {
  const Activations x(x_tensor, kOp);
  const LowBitFormat& format = find_format(format_name);
  const Cut cut = cut_depth(x.depth, group, input_group);
  NARROWCAST_CHECK(format.levels == nullptr || !zero_point.has_value(), kOp, format.name, " takes no zero_point");
  const Arguments arguments = read_arguments(x, weight, scale, zero_point, bias, group, format.bits);
  const Fused activation = find_fused(fused, kOp);
  Tensor out = x.empty_output(arguments.columns);
  if (x.rows == 0 || arguments.columns == 0) return out;
  const int64_t stride = round_up(cut.blocks * cut.block, 64);
  const bool parallel = is_parallel(x.rows, arguments.columns, x.depth);
  auto* codes = static_cast<uint8_t*>(workspace(Slot::codes, x.rows * (stride + 4 * cut.blocks) + 64));
  auto* code_scales = reinterpret_cast<float*>(codes + x.rows * stride);
  const LowBitLinear problem = {.rows = x.rows,
                                .codes = codes,
                                .code_stride = stride,
                                .code_scales = code_scales,
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
  const QuantizeKernels& quantize = kQuantizeTiers.active();
  quantize_rows(x, parallel && x.rows * x.depth > 2 * kQuantizeTask, kOp, [&](int64_t row) {
    uint8_t* row_codes = codes + row * stride;
    if (!quantize_row(quantize, x, row, cut, stride, row_codes, code_scales + row * cut.blocks)) return false;
    if (kernels.order_row != nullptr) kernels.order_row(problem, row_codes);
    return true;
  });
  const int64_t scratch = kernels.scratch(problem);
  for_each_tile(x.rows, arguments.columns, parallel, [&](Range rows, Range part) {
    kernels.tile(problem, rows, part, workspace(Slot::panel, scratch));
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("linear_lowbit_dynamic", TORCH_BOX(&narrowcast::linear_lowbit_dynamic));
}
