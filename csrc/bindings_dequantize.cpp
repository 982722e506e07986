// Torch binding of dequantize_weight: a stored weight to float32, at memory speed, on all threads.
#include "binding.h"
#include "binding_stored.h"

namespace narrowcast {
namespace {

// Runs one_row(row) for all rows; a task takes about 16384 values.
template <class OneRow>
void for_each_row(int64_t rows, int64_t columns, const OneRow& one_row) {
  const int64_t block = columns > 0 ? divide_up(16384, columns) : 1;
  for_each_task(divide_up(rows, block), rows * columns > 65536, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) one_row(row);
  });
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
  library.impl("dequantize_weight", TORCH_BOX(&narrowcast::dequantize_weight));
}
