// Torch binding of embedding_rows: look rows of a stored table up and expand only those.
#include "binding.h"
#include "binding_stored.h"

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

Tensor embedding_rows(const Tensor& indices, const Tensor& codes, const Tensor& scale,
                      const std::optional<Tensor>& zero_point, const std::optional<Tensor>& levels, int64_t bits,
                      int64_t group, int64_t columns) {
  constexpr const char* op = "embedding_rows";
  const StoredWeightArguments table(codes, scale, zero_point, levels, bits, group, columns, op);
  NARROWCAST_CHECK(columns > 0, op, "the table has no columns");
  const Indices index(op, indices, table.rows());
  Tensor out = new_rows(op, indices, columns);
  auto* values = static_cast<float*>(out.mutable_data_ptr());
  const ExpandKernels& kernels = kExpandTiers.active();
  for_each_position(index.count(), columns, [&](int64_t position) {
    kernels.expand(table.weight(), index.at(position), 0, columns, values + position * columns);
  });
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("embedding_rows", TORCH_BOX(&narrowcast::embedding_rows));
}
