// Torch bindings of dequantize_int8.
#include "binding.h"
#include "dequantize.h"

namespace narrowcast {
namespace {

#if NARROWCAST_X86
constexpr Tiers<DequantizeKernels> kTiers = {{&dequantize_scalar, &dequantize_avx2, &dequantize_avx512vnni}};
#else
constexpr Tiers<DequantizeKernels> kTiers = {{&dequantize_scalar, &dequantize_scalar, &dequantize_scalar}};
#endif

Tensor dequantize_int8(Tensor weight, Tensor scale) {
  constexpr const char* op = "dequantize_int8";
  check_tensor(weight, ScalarType::Char, 2, op, "weight");
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  NARROWCAST_CHECK(scale.size(0) == rows, op, "scale has ", scale.size(0), " entries for ", rows, " rows");
  weight = as_contiguous(weight);
  scale = as_contiguous(scale);
  const int64_t sizes[] = {rows, columns};
  Tensor out = empty_tensor(sizes, 2, FloatType::float32);
  const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const DequantizeKernels& kernels = kTiers.active();
  const int64_t block = columns > 0 ? divide_up(16384, columns) : rows;
  for_each_task(rows > 0 ? divide_up(rows, block) : 0, rows * columns > 65536, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) {
      kernels.int8_row(codes + row * columns, scales[row], columns, values + row * columns);
    }
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("dequantize_int8", TORCH_BOX(&narrowcast::dequantize_int8));
}
