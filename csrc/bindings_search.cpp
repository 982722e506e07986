// Torch binding of search_range: sixteen blocks of a weight are interleaved and searched at a time, on all threads.
#include "binding_encode.h"
#include "search.h"

namespace narrowcast {
namespace {

constexpr int64_t kBlocks = 16;

struct Weight {
  const float* values;      // [rows, columns]
  const float* importance;  // [columns] or null
  int64_t rows, columns, group, groups;
  CodeBounds range;
  int64_t refinements;

  // Blocks first .. first + 15 in the order of rows and their groups, zeros behind the end of a row and of the weight.
  void interleave(int64_t first, float* values_out, float* importance_out) const {
    for (int64_t lane = 0; lane < kBlocks; ++lane) {
      const int64_t block = first + lane, row = block / groups, begin = block % groups * group;
      const int64_t left = row < rows ? columns - begin : 0, count = left < group ? left : group;
      const float* source = values + row * columns + begin;
      for (int64_t i = 0; i < group; ++i) values_out[i * kBlocks + lane] = i < count ? source[i] : 0.0f;
      if (importance == nullptr) continue;
      for (int64_t i = 0; i < group; ++i) importance_out[i * kBlocks + lane] = i < count ? importance[begin + i] : 0.0f;
    }
  }

  void search(int64_t first, const SearchKernels& kernels, float* scale, int32_t* zero_point) const {
    const int64_t size = group * kBlocks;
    auto* memory = static_cast<float*>(workspace(Slot::codes, 5 * size * 4));
    float* weights = importance != nullptr ? memory + size : nullptr;
    interleave(first, memory, weights);
    float scales[kBlocks], zeros[kBlocks];
    const int64_t left = rows * groups - first, count = left < kBlocks ? left : kBlocks;
    for (int64_t lane = 0; lane < kBlocks; ++lane) {
      scales[lane] = lane < count ? scale[first + lane] : 1.0f;
      zeros[lane] = lane < count && zero_point != nullptr ? static_cast<float>(zero_point[first + lane]) : 0.0f;
    }
    kernels.search({memory, weights, group, range, refinements, memory + 2 * size}, scales, zeros);
    for (int64_t lane = 0; lane < count; ++lane) {
      scale[first + lane] = scales[lane];
      if (zero_point != nullptr) zero_point[first + lane] = static_cast<int32_t>(zeros[lane]);
    }
  }
};

std::tuple<Tensor, Tensor> search_range(const Tensor& weight, const std::optional<Tensor>& importance,
                                        int64_t group_size, int64_t bits, bool symmetric, int64_t scale_format,
                                        int64_t refinements) {
  constexpr const char* op = "search_range";
  check_tensor(weight, ScalarType::Float, 2, op, "weight");
  NARROWCAST_CHECK(group_size > 0 && group_size <= 65536, op, "group must be in 1..65536, got ", group_size);
  NARROWCAST_CHECK(refinements >= 0, op, "refinements must not be negative, got ", refinements);
  const int64_t rows = weight.size(0), columns = weight.size(1);
  // a row shorter than a group is one block of its own length: what is filled up with zeros adds in another order
  const int64_t group = columns > 0 && columns < group_size ? columns : group_size, groups = divide_up(columns, group);
  const CodeBounds range = code_range(bits, symmetric, scale_format, op);
  const Contiguous values(weight), weights(importance, columns, op, "importance");
  const int64_t parts[] = {rows, groups}, zero_parts[] = {symmetric ? 0 : rows, symmetric ? 0 : groups};
  Tensor scale = empty_tensor(parts, 2, FloatType::float32), zero_point = empty_tensor(zero_parts, 2, ScalarType::Int);
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  auto* zeros = symmetric ? nullptr : static_cast<int32_t*>(zero_point.mutable_data_ptr());
  const Weight problem{values.data<float>(), weights.data<float>(), rows, columns, group, groups, range, refinements};
  const EncodeKernels& encoder = kEncodeTiers.active();
  const SearchKernels& kernels = kSearchTiers.active();
  for_each_task(rows, rows * columns > 65536, [&](int64_t row) {
    int32_t* row_zero = zeros != nullptr ? zeros + row * groups : nullptr;
    encoder.choose(problem.values + row * columns, columns, group, range, scales + row * groups, row_zero);
  });
  for_each_task(divide_up(rows * groups, kBlocks), rows * columns > 4096, [&](int64_t task) {
    problem.search(task * kBlocks, kernels, scales, zeros);
  });
  return {scale, zero_point};
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("search_range", TORCH_BOX(&narrowcast::search_range));
}
