// Torch bindings of the linear ops: one call quantizes the activations, multiplies integers, scales and adds the bias.
#include "linear.h"
#include "linear_task.h"
#include "quantize.h"

#include <cmath>
#include <cstring>

#include "float_types.h"

namespace narrowcast {
namespace {

struct Int8Arguments {
  Contiguous weight, scale, offset, bias;
  int64_t columns;
  bool interleaved;
};

Int8Arguments read_int8(const Activations& x, const Tensor& weight, const Tensor& scale, const Tensor& offset,
                        const char* offset_name, const std::optional<Tensor>& bias, const char* op) {
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  const int64_t columns = scale.size(0);
  const bool interleaved = weight.dim() == 4;
  check_tensor(weight, ScalarType::Char, interleaved ? 4 : 2, op, "weight");
  if (interleaved) {
    check_interleaved(weight, {columns, x.depth, 8}, op);
  } else {
    NARROWCAST_CHECK(weight.size(1) == x.depth, op, "x has ", x.depth, " input features, weight has ", weight.size(1));
    check_length(scale, weight.size(0), op, "scale");
  }
  // 255 * 128 * depth must fit in int32.
  NARROWCAST_CHECK(x.depth <= 65536, op, "more than 65536 input features overflow the int32 sums");
  check_tensor(offset, ScalarType::Int, 1, op, offset_name);
  check_length(offset, columns, op, offset_name);
  return {Contiguous(weight), Contiguous(scale), Contiguous(offset), Contiguous(bias, columns, op, "bias"), columns, interleaved};
}

// What quantizing one row gives besides its codes.
struct RowTerms {
  float scale;
  int32_t offset;
};

// Quantizes by quantize_row(row, codes, &terms) and multiplies.
template <class QuantizeRow>
Tensor run_int8(const Activations& x, const Int8Arguments& arguments, const std::string& fused, const char* op,
                const QuantizeRow& quantize_row) {
  const Fused activation = find_fused(fused, op);
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
  Int8Linear problem = {codes,
                              stride,
                              row_scale,
                              row_offset,
                              arguments.weight.data<int8_t>(),
                              arguments.scale.data<float>(),
                              arguments.offset.data<int32_t>(),
                              arguments.bias.data<float>(),
                              activation,
                              x.depth,
                              out.mutable_data_ptr(),
                              columns,
                              x.type};
  const LinearKernels& kernels = kLinearTiers.active();
  if (arguments.interleaved && kernels.int8_interleaved != nullptr) {
    for_each_tile(x.rows, columns, parallel, [&](Range rows, Range part) {
      kernels.int8_interleaved(problem, rows, part, workspace(Slot::panel, int8_interleaved_scratch(x.depth)));
    });
    return out;
  }
  if (arguments.interleaved) {
    auto* stored = static_cast<uint8_t*>(workspace(Slot::extra, columns * x.depth));
    restore_rows({columns, x.depth, 8}, reinterpret_cast<const uint8_t*>(problem.weight), stored);
    problem.weight = reinterpret_cast<const int8_t*>(stored);
  }
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
                           const std::optional<Tensor>& bias, bool symmetric, std::string fused) {
  constexpr const char* op = "linear_int8_dynamic";
  const Activations x(x_tensor, op);
  const Int8Arguments arguments = read_int8(x, weight, scale, weight_sum, "weight_sum", bias, op);
  const QuantizeKernels& kernels = kQuantizeTiers.active();
  const auto quantize = symmetric ? quantize_symmetric : quantize_asymmetric;
  return run_int8(x, arguments, fused, op, [&](int64_t row, uint8_t* codes, RowTerms* terms) {
    return quantize(kernels, x, row, codes, terms);
  });
}

Tensor linear_int8_static(const Tensor& x_tensor, const Tensor& weight, const Tensor& scale, const Tensor& zero_sum,
                          const std::optional<Tensor>& bias, const Tensor& input_inverse,
                          const Tensor& input_zero_point, std::string fused) {
  constexpr const char* op = "linear_int8_static";
  const Activations x(x_tensor, op);
  const Int8Arguments arguments = read_int8(x, weight, scale, zero_sum, "zero_sum", bias, op);
  const InputRange range(input_inverse, input_zero_point, x.depth, op);
  const QuantizeKernels& quantize = kQuantizeTiers.active();
  return run_int8(x, arguments, fused, op, [&](int64_t row, uint8_t* codes, RowTerms*) {
    if (range.per_channel()) {
      return quantize.to_uint8_channels(x.row(row), x.type, x.depth, range.inverse(), range.zero_point(), codes);
    }
    return quantize.to_uint8(x.row(row), x.type, x.depth, *range.inverse(), *range.zero_point(), codes);
  });
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("linear_int8_dynamic", TORCH_BOX(&narrowcast::linear_int8_dynamic));
  library.impl("linear_int8_static", TORCH_BOX(&narrowcast::linear_int8_static));
}
