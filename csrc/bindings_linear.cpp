// Torch bindings of the linear ops: one call quantizes the activations, multiplies integers, scales and adds the bias.
#include "binding.h"
#include "linear.h"
#include "quantize.h"

#include <cmath>
#include <cstring>

#include "float_types.h"

namespace narrowcast {
namespace {

// Below this many multiply-accumulates (about 20 us) starting a second thread costs more than it brings.
constexpr int64_t kSerialWork = int64_t{3} << 20;
// Elements of x that one quantization task takes.
constexpr int64_t kQuantizeTask = 16384;

// The activation tensor seen as rows.
struct Activations {
  Activations(const Tensor& x, const char* op) : type(float_type(x, op, "x")), values(x), dimensions(x.dim()) {
    NARROWCAST_CHECK(dimensions >= 1 && dimensions <= 16, op, "x must have 1 to 16 dimensions, got ", dimensions);
    std::memcpy(sizes, x.sizes().data(), static_cast<size_t>(dimensions) * sizeof(int64_t));
    depth = sizes[dimensions - 1];
    for (int64_t axis = 0; axis + 1 < dimensions; ++axis) rows *= sizes[axis];
  }

  const void* row(int64_t index) const { return values.data<char>() + index * depth * float_bytes(type); }

  Tensor empty_output(int64_t columns) const {
    int64_t out_sizes[16];
    std::memcpy(out_sizes, sizes, sizeof(sizes));
    out_sizes[dimensions - 1] = columns;
    return empty_tensor(out_sizes, dimensions, type);
  }

  FloatType type;
  Contiguous values;
  int64_t dimensions, rows = 1, depth;
  int64_t sizes[16];
};

// Runs quantize_row(row) -> finite for all rows on all threads and raises for the first row that is not finite.
template <class QuantizeRow>
void quantize_rows(const Activations& x, bool parallel, const char* op, const QuantizeRow& quantize_row) {
  const int64_t block = x.depth > 0 ? divide_up(kQuantizeTask, x.depth) : x.rows;
  std::atomic<int64_t> bad{x.rows};
  for_each_task(divide_up(x.rows, block > 0 ? block : 1), parallel, [&](int64_t task) {
    const int64_t end = (task + 1) * block < x.rows ? (task + 1) * block : x.rows;
    for (int64_t row = task * block; row < end; ++row) {
      if (__builtin_expect(quantize_row(row), 1)) continue;
      int64_t first = bad.load();
      while (row < first && !bad.compare_exchange_weak(first, row)) {
      }
      break;
    }
  });
  NARROWCAST_CHECK(bad.load() == x.rows, op, "Non-finite value in row ", bad.load(), " of x");
}

// Splits [rows, columns] of the output into tiles of at most kColumnTile columns and runs them on all threads.
template <class RunTile>
void for_each_tile(int64_t rows, int64_t columns, bool parallel, const RunTile& run_tile) {
  if (!parallel) {
    run_tile(Range{0, rows}, Range{0, columns});
    return;
  }
  const int64_t column_tiles = divide_up(columns, kColumnTile);
  const int64_t wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  // Each part of the rows copies the weights once more: at least 48 rows pay for that.
  int64_t row_parts = column_tiles >= wanted ? 1 : divide_up(wanted, column_tiles);
  const int64_t most = rows / 48 > 1 ? rows / 48 : 1;
  row_parts = row_parts < most ? row_parts : most;
  const int64_t row_step = divide_up(rows, row_parts);
  row_parts = divide_up(rows, row_step);
  for_each_task(column_tiles * row_parts, true, [&](int64_t task) {
    const int64_t column = task / row_parts * kColumnTile, row = task % row_parts * row_step;
    run_tile(Range{row, row + row_step < rows ? row + row_step : rows},
             Range{column, column + kColumnTile < columns ? column + kColumnTile : columns});
  });
}

// A narrow row costs as much as several: reading the weights is the work then.
bool is_parallel(int64_t rows, int64_t columns, int64_t depth) {
  return (rows > 4 ? rows : 4) * columns * depth > kSerialWork && torch::stable::get_num_threads() > 1;
}

struct Int8Arguments {
  Contiguous weight, scale, offset, bias;
  int64_t columns;
};

Int8Arguments read_int8(const Activations& x, const Tensor& weight, const Tensor& scale, const Tensor& offset,
                        const char* offset_name, const std::optional<Tensor>& bias, const char* op) {
  check_tensor(weight, ScalarType::Char, 2, op, "weight");
  const int64_t columns = weight.size(0);
  NARROWCAST_CHECK(weight.size(1) == x.depth, op, "x has ", x.depth, " input features, weight has ", weight.size(1));
  // 255 * 128 * depth must fit in int32.
  NARROWCAST_CHECK(x.depth <= 65536, op, "more than 65536 input features overflow the int32 sums");
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  check_length(scale, columns, op, "scale");
  check_tensor(offset, ScalarType::Int, 1, op, offset_name);
  check_length(offset, columns, op, offset_name);
  return {Contiguous(weight), Contiguous(scale), Contiguous(offset), Contiguous(bias, columns, op, "bias"), columns};
}

// What quantizing one row gives besides its codes.
struct RowTerms {
  float scale;
  int32_t offset;
};

// Quantizes by quantize_row(row, codes, &terms) and multiplies.
template <class QuantizeRow>
Tensor run_int8(const Activations& x, const Int8Arguments& arguments, const char* op,
                const QuantizeRow& quantize_row) {
  const int64_t columns = arguments.columns, stride = round_up(x.depth > 0 ? x.depth : 1, 64);
  Tensor out = x.empty_output(columns);
  if (x.rows == 0 || columns == 0) return out;
  const bool parallel = is_parallel(x.rows, columns, x.depth);
  auto* codes = static_cast<uint8_t*>(workspace(Slot::codes, x.rows * (stride + 8)));
  auto* row_scale = reinterpret_cast<float*>(codes + x.rows * stride);
  auto* row_offset = reinterpret_cast<int32_t*>(row_scale + x.rows);
  quantize_rows(x, parallel && x.rows * x.depth > 2 * kQuantizeTask, op, [&](int64_t row) {
    RowTerms terms = {1.0f, 1};
    const bool finite = quantize_row(row, codes + row * stride, &terms);
    row_scale[row] = terms.scale;
    row_offset[row] = terms.offset;
    return finite;
  });
  const Int8Linear problem = {codes,
                              stride,
                              row_scale,
                              row_offset,
                              arguments.weight.data<int8_t>(),
                              arguments.scale.data<float>(),
                              arguments.offset.data<int32_t>(),
                              arguments.bias.data<float>(),
                              x.depth,
                              out.mutable_data_ptr(),
                              columns,
                              x.type};
  const LinearKernels& kernels = kLinearTiers.active();
  const int64_t scratch = kernels.int8_scratch(x.depth);
  for_each_tile(x.rows, columns, parallel, [&](Range rows, Range part) {
    kernels.int8_tile(problem, rows, part, workspace(Slot::panel, scratch));
  });
  return out;
}

// Symmetric: |x| up to absmax becomes -127..127, stored with 128 added.
bool quantize_symmetric(const QuantizeKernels& kernels, const Activations& x, int64_t row, uint8_t* codes,
                        RowTerms* terms) {
  const uint32_t bits = kernels.absmax_bits(x.row(row), x.type, x.depth);
  const bool zero = bits < kSmallestRangeBits;
  *terms = {zero ? 1.0f : bits_to_float(bits) / 127.0f, 128};
  if (bits >= kNonFiniteBits) return false;
  return kernels.to_uint8(x.row(row), x.type, x.depth, zero ? 0.0f : 127.0f / bits_to_float(bits), 128, codes);
}

// Asymmetric: low..high, widened to contain 0, becomes 0..255.
bool quantize_asymmetric(const QuantizeKernels& kernels, const Activations& x, int64_t row, uint8_t* codes,
                         RowTerms* terms) {
  float low, high;
  if (!kernels.range(x.row(row), x.type, x.depth, &low, &high)) return false;
  const bool zero = (-low > high ? -low : high) < bits_to_float(kSmallestRangeBits);
  // divided before subtracted: high - low may overflow where neither bound does
  const float scale = zero ? 1.0f : high / 255.0f - low / 255.0f, inverse = zero ? 0.0f : 1.0f / scale;
  *terms = {scale, static_cast<int32_t>(std::lrintf(-low * inverse))};
  terms->offset = terms->offset < 255 ? terms->offset : 255;
  return kernels.to_uint8(x.row(row), x.type, x.depth, inverse, terms->offset, codes);
}

Tensor linear_int8_dynamic(const Tensor& x_tensor, const Tensor& weight, const Tensor& scale, const Tensor& weight_sum,
                           const std::optional<Tensor>& bias, bool symmetric) {
  constexpr const char* op = "linear_int8_dynamic";
  const Activations x(x_tensor, op);
  const Int8Arguments arguments = read_int8(x, weight, scale, weight_sum, "weight_sum", bias, op);
  const QuantizeKernels& kernels = kQuantizeTiers.active();
  const auto quantize = symmetric ? quantize_symmetric : quantize_asymmetric;
  return run_int8(x, arguments, op, [&](int64_t row, uint8_t* codes, RowTerms* terms) {
    return quantize(kernels, x, row, codes, terms);
  });
}

Tensor linear_int8_static(const Tensor& x_tensor, const Tensor& weight, const Tensor& scale, const Tensor& zero_sum,
                          const std::optional<Tensor>& bias, const Tensor& input_inverse,
                          const Tensor& input_zero_point) {
  constexpr const char* op = "linear_int8_static";
  const Activations x(x_tensor, op);
  const Int8Arguments arguments = read_int8(x, weight, scale, zero_sum, "zero_sum", bias, op);
  const InputRange range(input_inverse, input_zero_point, x.depth, op);
  const QuantizeKernels& quantize = kQuantizeTiers.active();
  return run_int8(x, arguments, op, [&](int64_t row, uint8_t* codes, RowTerms*) {
    if (range.per_channel()) {
      return quantize.to_uint8_channels(x.row(row), x.type, x.depth, range.inverse(), range.zero_point(), codes);
    }
    return quantize.to_uint8(x.row(row), x.type, x.depth, *range.inverse(), *range.zero_point(), codes);
  });
}

struct Int4Arguments {
  Contiguous weight, scale, zero_point, bias;
  int64_t columns, groups, blocks_per_group;
};

Int4Arguments read_int4(const Activations& x, const Tensor& weight, const Tensor& scale,
                        const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias, int64_t group,
                        const char* op) {
  check_tensor(weight, ScalarType::Byte, 2, op, "weight");
  const int64_t columns = weight.size(0);
  NARROWCAST_CHECK(weight.size(1) == divide_up(x.depth, 2), op, "x has ", x.depth, " input features, weight has rows of ",
                   weight.size(1), " bytes");
  NARROWCAST_CHECK(group > 0 && (group % kActivationGroup == 0 || group >= x.depth), op,
                   "group must be a multiple of 32 or the number of input features, got ", group);
  const int64_t groups = divide_up(x.depth, group);
  check_tensor(scale, ScalarType::Half, 2, op, "scale");
  NARROWCAST_CHECK(scale.size(0) == columns && scale.size(1) == groups, op, "scale must have shape [", columns, ", ",
                   groups, "], got ", shape_text(scale));
  if (zero_point.has_value()) {
    check_tensor(*zero_point, ScalarType::Byte, 2, op, "zero_point");
    NARROWCAST_CHECK(zero_point->size(0) == columns && zero_point->size(1) == groups, op,
                     "zero_point must have shape [", columns, ", ", groups, "], got ", shape_text(*zero_point));
  }
  return {Contiguous(weight),
          Contiguous(scale),
          zero_point.has_value() ? Contiguous(*zero_point) : Contiguous(),
          Contiguous(bias, columns, op, "bias"),
          columns,
          groups,
          divide_up(group, kActivationGroup)};
}

Tensor linear_int4_dynamic(const Tensor& x_tensor, const Tensor& weight, const Tensor& scale,
                           const std::optional<Tensor>& zero_point, const std::optional<Tensor>& bias, int64_t group) {
  constexpr const char* op = "linear_int4_dynamic";
  const Activations x(x_tensor, op);
  const Int4Arguments arguments = read_int4(x, weight, scale, zero_point, bias, group, op);
  Tensor out = x.empty_output(arguments.columns);
  if (x.rows == 0 || arguments.columns == 0) return out;
  const int64_t stride = round_up(x.depth > 0 ? x.depth : 1, 128), blocks = stride / kActivationGroup;
  const int64_t used = divide_up(x.depth, kActivationGroup);
  const bool parallel = is_parallel(x.rows, arguments.columns, x.depth);
  auto* codes = static_cast<int8_t*>(workspace(Slot::codes, x.rows * (stride + 8 * blocks)));
  auto* code_scales = reinterpret_cast<float*>(codes + x.rows * stride);
  auto* code_sums = reinterpret_cast<int32_t*>(code_scales + x.rows * blocks);
  const QuantizeKernels& quantize = kQuantizeTiers.active();
  quantize_rows(x, parallel && x.rows * x.depth > 2 * kQuantizeTask, op, [&](int64_t row) {
    const int64_t rest = blocks - used;
    std::memset(codes + row * stride + used * kActivationGroup, 0, static_cast<size_t>(rest * kActivationGroup));
    std::memset(code_scales + row * blocks + used, 0, static_cast<size_t>(rest) * sizeof(float));
    std::memset(code_sums + row * blocks + used, 0, static_cast<size_t>(rest) * sizeof(int32_t));
    return quantize.to_int8_groups(x.row(row), x.type, x.depth, codes + row * stride, code_scales + row * blocks,
                                   code_sums + row * blocks);
  });
  const Int4Linear problem = {codes,
                              stride,
                              code_scales,
                              code_sums,
                              blocks,
                              arguments.weight.data<uint8_t>(),
                              arguments.scale.data<uint16_t>(),
                              arguments.zero_point.data<uint8_t>(),
                              arguments.groups,
                              arguments.blocks_per_group,
                              arguments.bias.data<float>(),
                              x.depth,
                              out.mutable_data_ptr(),
                              arguments.columns,
                              x.type};
  const LinearKernels& kernels = kLinearTiers.active();
  const int64_t scratch = kernels.int4_scratch(x.depth);
  for_each_tile(x.rows, arguments.columns, parallel, [&](Range rows, Range part) {
    kernels.int4_tile(problem, rows, part, workspace(Slot::panel, scratch));
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("linear_int8_dynamic", TORCH_BOX(&narrowcast::linear_int8_dynamic));
  library.impl("linear_int8_static", TORCH_BOX(&narrowcast::linear_int8_static));
  library.impl("linear_int4_dynamic", TORCH_BOX(&narrowcast::linear_int4_dynamic));
}
