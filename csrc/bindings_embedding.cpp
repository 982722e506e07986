// Torch bindings of embedding_int8 and embedding_int4: look rows up and dequantize only those.
#include "binding.h"
#include "dequantize.h"

namespace narrowcast {
namespace {


// Row numbers in any shape; every one is checked before a row is read.
class Indices {
 public:
  Indices(const char* op, const Tensor& indices, int64_t rows) : values_(as_contiguous(indices)) {
    NARROWCAST_CHECK(indices.is_cpu(), op, "indices must be on the CPU");
    const ScalarType type = indices.scalar_type();
    NARROWCAST_CHECK(type == ScalarType::Long || type == ScalarType::Int, op, "indices must be int64 or int32");
    wide_ = type == ScalarType::Long;
    count_ = values_.numel();
    for (int64_t i = 0; i < count_; ++i) {
      NARROWCAST_CHECK(at(i) >= 0 && at(i) < rows, op, "index ", at(i), " at position ", i, " is not in 0..", rows - 1);
    }
  }

  int64_t count() const { return count_; }
  int64_t at(int64_t i) const {
    return wide_ ? static_cast<const int64_t*>(values_.const_data_ptr())[i]
                 : static_cast<const int32_t*>(values_.const_data_ptr())[i];
  }

 private:
  Tensor values_;
  bool wide_ = true;
  int64_t count_ = 0;
};

// [*shape of indices, columns] float32.
Tensor new_rows(const char* op, const Tensor& indices, int64_t columns) {
  int64_t sizes[16];
  NARROWCAST_CHECK(indices.dim() < 16, op, "indices has ", indices.dim(), " dimensions");
  for (int64_t axis = 0; axis < indices.dim(); ++axis) sizes[axis] = indices.size(axis);
  sizes[indices.dim()] = columns;
  return empty_tensor(sizes, indices.dim() + 1, FloatType::float32);
}

// Runs look_up(position) for all positions; a task writes about 16384 values.
template <class LookUp>
void for_each_position(int64_t count, int64_t columns, const LookUp& look_up) {
  const int64_t block = divide_up(16384, columns);
  for_each_task(divide_up(count, block), count * columns > 65536, [&](int64_t task) {
    const int64_t end = (task + 1) * block < count ? (task + 1) * block : count;
    for (int64_t position = task * block; position < end; ++position) look_up(position);
  });
}

Tensor embedding_int8(Tensor indices, Tensor weight, Tensor scale, std::optional<Tensor> zero_point) {
  constexpr const char* op = "embedding_int8";
  check_tensor(weight, ScalarType::Char, 2, op, "weight");
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  const int64_t rows = weight.size(0), columns = weight.size(1);
  NARROWCAST_CHECK(scale.size(0) == rows, op, "scale has ", scale.size(0), " entries for ", rows, " rows");
  NARROWCAST_CHECK(columns > 0, op, "weight ", shape_text(weight), " has no columns");
  const Indices index(op, indices, rows);
  const Contiguous zeros = int8_zero_points(zero_point, rows, op);
  weight = as_contiguous(weight), scale = as_contiguous(scale);
  Tensor out = new_rows(op, indices, columns);
  const auto* codes = static_cast<const int8_t*>(weight.const_data_ptr());
  const auto* scales = static_cast<const float*>(scale.const_data_ptr());
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const DequantizeKernels& kernels = kDequantizeTiers.active();
  for_each_position(index.count(), columns, [&](int64_t position) {
    const int64_t row = index.at(position);
    const int32_t zero = zeros.data<uint8_t>() != nullptr ? zeros.data<uint8_t>()[row] - 128 : 0;
    kernels.int8_row(codes + row * columns, scales[row], zero, columns, values + position * columns);
  });
  return out;
}

Tensor embedding_int4(Tensor indices, Tensor weight, Tensor scale, std::optional<Tensor> zero_point, int64_t group,
                      int64_t dim) {
  constexpr const char* op = "embedding_int4";
  check_tensor(weight, ScalarType::Byte, 2, op, "weight");
  check_tensor(scale, ScalarType::Half, 2, op, "scale");
  NARROWCAST_CHECK(dim > 0 && weight.size(1) == divide_up(dim, 2), op, "rows of ", weight.size(1),
                   " bytes cannot hold ", dim, " columns");
  NARROWCAST_CHECK(group > 0 && (group % 2 == 0 || group >= dim), op,
                   "group must be even or the number of columns, got ", group);
  const int64_t rows = weight.size(0), groups = divide_up(dim, group), bytes = weight.size(1);
  NARROWCAST_CHECK(scale.size(0) == rows && scale.size(1) == groups, op, "scale is ", shape_text(scale),
                   ", expected [", rows, ", ", groups, "]");
  const uint8_t* zeros = nullptr;
  if (zero_point) {
    check_tensor(*zero_point, ScalarType::Byte, 2, op, "zero_point");
    NARROWCAST_CHECK(zero_point->size(0) == rows && zero_point->size(1) == groups, op, "zero_point is ",
                     shape_text(*zero_point), ", expected [", rows, ", ", groups, "]");
    zero_point = as_contiguous(*zero_point);
    zeros = static_cast<const uint8_t*>(zero_point->const_data_ptr());
  }
  const Indices index(op, indices, rows);
  weight = as_contiguous(weight), scale = as_contiguous(scale);
  Tensor out = new_rows(op, indices, dim);
  const auto* packed = static_cast<const uint8_t*>(weight.const_data_ptr());
  const auto* scales = static_cast<const uint16_t*>(scale.const_data_ptr());
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const DequantizeKernels& kernels = kDequantizeTiers.active();
  for_each_position(index.count(), dim, [&](int64_t position) {
    const int64_t row = index.at(position);
    kernels.int4_row(packed + row * bytes, scales + row * groups, zeros ? zeros + row * groups : nullptr, group, dim,
                     values + position * dim);
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("embedding_int8", TORCH_BOX(&narrowcast::embedding_int8));
  library.impl("embedding_int4", TORCH_BOX(&narrowcast::embedding_int4));
}
