// Torch bindings of the weight-only ops: stored codes to float32, at memory speed, on all threads.
#include "binding.h"
#include "binding_stored.h"
#include "dequantize.h"

namespace narrowcast {
namespace {

#if NARROWCAST_X86
constexpr Tiers<DequantizeKernels> kTiers = {{&dequantize_scalar, &dequantize_avx2, &dequantize_avx512vnni}};
#else
constexpr Tiers<DequantizeKernels> kTiers = {{&dequantize_scalar, &dequantize_scalar, &dequantize_scalar}};
#endif

// Runs one_row(row) for all rows; a task takes about 16384 values.
template <class OneRow>
void for_each_row(int64_t rows, int64_t columns, const OneRow& one_row) {
  const int64_t block = columns > 0 ? divide_up(16384, columns) : 1;
  for_each_task(divide_up(rows, block), rows * columns > 65536, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) one_row(row);
  });
}

Tensor dequantize_int8(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& zero_point) {
  constexpr const char* op = "dequantize_int8";
  check_tensor(weight, ScalarType::Char, 2, op, "weight");
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  check_length(scale, rows, op, "scale");
  const Contiguous weights(weight), scales(scale), zeros = int8_zero_points(zero_point, rows, op);
  const int64_t sizes[] = {rows, columns};
  Tensor out = empty_tensor(sizes, 2, FloatType::float32);
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const DequantizeKernels& kernels = kTiers.active();
  for_each_row(rows, columns, [&](int64_t row) {
    const int32_t zero = zeros.data<uint8_t>() != nullptr ? zeros.data<uint8_t>()[row] - 128 : 0;
    kernels.int8_row(weights.data<int8_t>() + row * columns, scales.data<float>()[row], zero, columns,
                     values + row * columns);
  });
  return out;
}

Tensor dequantize_int4(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& zero_point,
                       int64_t group, int64_t columns) {
  constexpr const char* op = "dequantize_int4";
  check_tensor(weight, ScalarType::Byte, 2, op, "weight");
  check_tensor(scale, ScalarType::Half, 2, op, "scale");
  NARROWCAST_CHECK(columns >= 0 && weight.size(1) == divide_up(columns, 2), op, "rows of ", weight.size(1),
                   " bytes cannot hold ", columns, " columns");
  NARROWCAST_CHECK(group > 0 && (group % 2 == 0 || group >= columns), op,
                   "group must be even or the number of columns, got ", group);
  const int64_t rows = weight.size(0), groups = divide_up(columns, group), row_bytes = weight.size(1);
  NARROWCAST_CHECK(scale.size(0) == rows && scale.size(1) == groups, op, "scale must have shape [", rows, ", ", groups,
                   "], got ", shape_text(scale));
  if (zero_point.has_value()) {
    check_tensor(*zero_point, ScalarType::Byte, 2, op, "zero_point");
    NARROWCAST_CHECK(zero_point->size(0) == rows && zero_point->size(1) == groups, op, "zero_point must have shape [",
                     rows, ", ", groups, "], got ", shape_text(*zero_point));
  }
  const Contiguous weights(weight), scales(scale);
  const Contiguous zeros = zero_point.has_value() ? Contiguous(*zero_point) : Contiguous();
  const int64_t sizes[] = {rows, columns};
  Tensor out = empty_tensor(sizes, 2, FloatType::float32);
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const DequantizeKernels& kernels = kTiers.active();
  for_each_row(rows, columns, [&](int64_t row) {
    const uint8_t* zero = zeros.data<uint8_t>() != nullptr ? zeros.data<uint8_t>() + row * groups : nullptr;
    kernels.int4_row(weights.data<uint8_t>() + row * row_bytes, scales.data<uint16_t>() + row * groups, zero, group,
                     columns, values + row * columns);
  });
  return out;
}

Tensor dequantize_weight(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& zero_point,
                         const std::optional<Tensor>& levels, int64_t bits, int64_t group, int64_t columns) {
  const StoredWeightArguments stored(codes, scale, zero_point, levels, bits, group, columns, "dequantize_weight");
  const int64_t sizes[] = {stored.rows(), columns};
  Tensor out = empty_tensor(sizes, 2, FloatType::float32);
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const ExpandKernels& kernels = kExpandTiers.active();
  for_each_row(stored.rows(), columns, [&](int64_t row) {
    kernels.expand(stored.weight(), row, 0, columns, values + row * columns);
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("dequantize_int8", TORCH_BOX(&narrowcast::dequantize_int8));
  library.impl("dequantize_weight", TORCH_BOX(&narrowcast::dequantize_weight));
  library.impl("dequantize_int4", TORCH_BOX(&narrowcast::dequantize_int4));
}
