// What the bindings of the linear ops share: the activations as rows, and the cutting of the work into tasks.
#pragma once

#include "binding.h"

#include <cstring>

#include "float_types.h"
#include "interleaved.h"
#include "linear.h"

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

// Checks that a tensor of four dimensions has the sizes of an interleaved weight.
inline void check_interleaved(const Tensor& weight, const Interleaved& layout, const char* op) {
  const bool fits = weight.size(0) == layout.panels() && weight.size(1) == layout.chunks() &&
                    weight.size(2) == layout.bits && weight.size(3) == kUnitBytes;
  NARROWCAST_CHECK(fits, op, "an interleaved weight of ", layout.rows, " rows and ", layout.columns,
                   " columns of ", layout.bits, " bits has shape [", layout.panels(), ", ", layout.chunks(), ", ",
                   layout.bits, ", ", kUnitBytes, "], got ", shape_text(weight));
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
inline bool is_parallel(int64_t rows, int64_t columns, int64_t depth) {
  return (rows > 4 ? rows : 4) * columns * depth > kSerialWork && torch::stable::get_num_threads() > 1;
}

// The activation function of that name.
inline Fused find_fused(const std::string& name, const char* op) {
  constexpr const char* names[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int index = 0; index < 5; ++index) {
    if (name == names[index]) return static_cast<Fused>(index);
  }
  fail(op, "fused '", name, "' is not known; use none, relu, gelu, gelu_tanh, silu");
}

}  // namespace
}  // namespace narrowcast
