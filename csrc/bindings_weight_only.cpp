// Torch binding of linear_weight_only: float inputs, stored weights of any format, products and sums in float32.
#include <cstring>

#include "binding.h"
#include "binding_stored.h"
#include "float_types.h"
#include "fused.h"
#include "linear_task.h"
#include "weight_only.h"

namespace narrowcast {
namespace {

constexpr int64_t kFewRows = 8;       // up to here the codes are expanded in registers, again for every four rows
constexpr int64_t kPanelStride = kPanelBytes + kPanelPad;

struct Call {
  const StoredWeight& weight;
  int64_t rows, columns;
  const void* x;  // [rows, depth] contiguous
  FloatType type;
  const float* bias;
  Fused fused;
  void* out;

  int64_t depth() const { return weight.columns; }

  void finish(int64_t row, int64_t column, const float* sums, int64_t count) const {
    typedef float Float4 __attribute__((vector_size(16)));
    typedef int32_t Int4 __attribute__((vector_size(16)));
    for (int64_t at = 0; at < count; at += 4) {
      const int64_t left = count - at < 4 ? count - at : 4;
      Float4 four{};
      for (int64_t i = 0; i < left; ++i) four[i] = bias != nullptr ? sums[at + i] + bias[column + at + i] : sums[at + i];
      four = fuse<Float4, Int4>(fused, four);
      for (int64_t i = 0; i < left; ++i) store_float(out, type, row * columns + column + at + i, four[i]);
    }
  }

  const float* row_as_float(int64_t row, int64_t begin, int64_t count, float* buffer) const {
    const int64_t first = row * depth() + begin;
    if (type == FloatType::float32) return static_cast<const float*>(x) + first;
    for (int64_t i = 0; i < count; ++i) buffer[i] = load_float(x, type, first + i);
    return buffer;
  }
};

void run_few_rows(const Call& call, const WeightOnlyKernels& kernels) {
  const StoredWeight& weight = call.weight;
  const int parts = call.type == FloatType::bfloat16 ? 1 : 2;
  const int64_t stride = kernels.arranged(weight, parts), columns_per_task = 64;
  auto* arranged = static_cast<float*>(workspace(Slot::codes, (call.rows * stride + call.depth()) * 4));
  float* widened = arranged + call.rows * stride;
  for (int64_t row = 0; row < call.rows; ++row) {
    kernels.arrange(weight, call.row_as_float(row, 0, call.depth(), widened), parts, arranged + row * stride);
  }
  const bool parallel = call.columns * call.depth() > 65536;
  for_each_task(divide_up(call.columns, columns_per_task), parallel, [&](int64_t task) {
    const int64_t begin = task * columns_per_task;
    const int64_t end = begin + columns_per_task < call.columns ? begin + columns_per_task : call.columns;
    float sums[kFewRows * 64];
    kernels.few_rows(weight, arranged, parts, call.rows, begin, end, sums);
    for (int64_t row = 0; row < call.rows; ++row) call.finish(row, begin, sums + row * (end - begin), end - begin);
  });
}

// Depth in chunks of one panel; the inputs are copied chunk by chunk, all rows of a chunk together.
struct Panels {
  const Call& call;
  const WeightOnlyKernels& kernels;
  int64_t element_bytes;

  int64_t chunk() const { return kPanelBytes / element_bytes; }
  int64_t chunks() const { return divide_up(call.depth(), chunk()); }
  int64_t length(int64_t index) const {
    const int64_t left = call.depth() - index * chunk();
    return left < chunk() ? left : chunk();
  }
  int64_t depth_bytes(int64_t index) const { return round_up(length(index) * element_bytes, 64); }

  void copy_row(int64_t row, char* inputs) const {
    float buffer[kPanelBytes / 2];
    for (int64_t index = 0; index < chunks(); ++index) {
      char* target = inputs + (index * call.rows + row) * kPanelStride;
      const int64_t begin = index * chunk(), count = length(index);
      if (element_bytes == 2) {
        const int64_t bytes = count * 2;
        std::memcpy(target, static_cast<const uint16_t*>(call.x) + row * call.depth() + begin, bytes);
        std::memset(target + bytes, 0, depth_bytes(index) - bytes);
      } else {
        const float* values = call.row_as_float(row, begin, count, buffer);
        std::memcpy(target, values, count * 4);
        std::memset(target + count * 4, 0, depth_bytes(index) - count * 4);
      }
    }
  }

  void run_tile(const char* inputs, int64_t first_row, int64_t first_column, const ExpandKernels& expander) const {
    const int64_t rows = call.rows - first_row < kPanelRows ? call.rows - first_row : kPanelRows;
    const int64_t left = call.columns - first_column, columns = left < kPanelColumns ? left : kPanelColumns;
    constexpr int64_t sum_bytes = kPanelRows * kPanelColumns * 4, panel_bytes = kPanelColumns * kPanelStride;
    auto* sums = static_cast<float*>(workspace(Slot::panel, sum_bytes + panel_bytes + kPanelBytes * 2));
    char* panel = reinterpret_cast<char*>(sums) + sum_bytes;
    auto* expanded = reinterpret_cast<float*>(panel + panel_bytes);
    std::memset(sums, 0, rows * kPanelColumns * 4);
    for (int64_t index = 0; index < chunks(); ++index) {
      const int64_t depth = depth_bytes(index);
      for (int64_t column = 0; column < columns; ++column) {
        char* target = panel + column * kPanelStride;
        auto* values = element_bytes == 4 ? reinterpret_cast<float*>(target) : expanded;
        expander.expand(call.weight, first_column + column, index * chunk(), length(index), values);
        if (element_bytes == 2) {
          kernels.to_panel(values, length(index), depth, target);
        } else {
          std::memset(target + length(index) * 4, 0, depth - length(index) * 4);
        }
      }
      for (int64_t column = columns; column < kPanelColumns; ++column) {
        std::memset(panel + column * kPanelStride, 0, depth);  // the register tile reads a few rows further
      }
      const char* x = inputs + (index * call.rows + first_row) * kPanelStride;
      kernels.dot_panel(x, rows, panel, columns, depth, sums);
    }
    for (int64_t row = 0; row < rows; ++row) {
      call.finish(first_row + row, first_column, sums + row * kPanelColumns, columns);
    }
  }

  void run() const {
    const int64_t bytes = chunks() * call.rows * kPanelStride;
    auto* inputs = static_cast<char*>(workspace(Slot::codes, bytes));
    for_each_task(call.rows, call.rows * call.depth() > 65536, [&](int64_t row) { copy_row(row, inputs); });
    const ExpandKernels& expander = kExpandTiers.active();
    const int64_t tiles = divide_up(call.columns, kPanelColumns), blocks = divide_up(call.rows, kPanelRows);
    for_each_task(tiles * blocks, call.rows * call.columns * call.depth() > 65536, [&](int64_t task) {
      run_tile(inputs, task / tiles * kPanelRows, task % tiles * kPanelColumns, expander);
    });
  }
};

Tensor linear_weight_only(const Tensor& x, const Tensor& codes, const Tensor& scale,
                          const std::optional<Tensor>& zero_point, const std::optional<Tensor>& levels,
                          const std::optional<Tensor>& bias, int64_t bits, int64_t group, std::string fused) {
  constexpr const char* op = "linear_weight_only";
  const FloatType type = float_type(x, op, "x");
  const Fused activation = find_fused(fused, op);
  NARROWCAST_CHECK(x.dim() >= 1 && x.dim() < 16, op, "x has ", x.dim(), " dimensions");
  const int64_t depth = x.size(x.dim() - 1);
  const StoredWeightArguments stored(codes, scale, zero_point, levels, bits, group, depth, op);
  int64_t sizes[16], rows = 1;
  for (int64_t axis = 0; axis + 1 < x.dim(); ++axis) rows *= sizes[axis] = x.size(axis);
  sizes[x.dim() - 1] = stored.rows();
  Tensor out = empty_tensor(sizes, x.dim(), type);
  const Contiguous input(x), biases(bias, stored.rows(), op, "bias");
  const Call call{stored.weight(), rows, stored.rows(), input.data(), type, biases.data<float>(), activation, out.mutable_data_ptr()};
  if (rows == 0 || stored.rows() == 0) return out;
  const WeightOnlyKernels& kernels = kWeightOnlyTiers.active();
#if NARROWCAST_X86
  const bool has_bfloat16 = active_isa() == Isa::avx512vnni && has_avx512bf16();
  const WeightOnlyKernels& other = has_bfloat16 ? weight_only_avx512bf16 : kernels;
#else
  constexpr bool has_bfloat16 = false;
  const WeightOnlyKernels& other = kernels;
#endif
  // bytes are two lookups and, of float32, two parts: four products, where the float kernel has one
  const bool in_pairs = bits < 8 || type == FloatType::bfloat16;
  if (rows <= kFewRows && in_pairs && other.covers(stored.weight())) {
    run_few_rows(call, other);
  } else if (rows <= kFewRows && kernels.covers(stored.weight())) {
    run_few_rows(call, kernels);
  } else if (has_bfloat16 && type == FloatType::bfloat16) {
    Panels{call, other, 2}.run();
  } else {
    Panels{call, kernels, 4}.run();
  }
  return out;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("linear_weight_only", TORCH_BOX(&narrowcast::linear_weight_only));
}
