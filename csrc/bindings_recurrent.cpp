// Torch bindings of lstm_int8 and gru_int8.
#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "binding.h"
#include "recurrent_run.h"

namespace narrowcast {
namespace {

constexpr int64_t kTaskRows = 48;                 // rows of the batch that share one pass over the weights
constexpr int64_t kSerialProducts = 1 << 20;      // about 10 us of dot products

struct Matrix {
  Tensor weight, scale, sum;
  std::optional<Tensor> bias;
};

void check_matrix(const char* op, const Matrix& matrix, int64_t rows, int64_t columns, const char* name) {
  check_tensor(matrix.weight, ScalarType::Char, 2, op, name);
  check_tensor(matrix.scale, ScalarType::Float, 1, op, "scale");
  check_tensor(matrix.sum, ScalarType::Int, 1, op, "sum");
  NARROWCAST_CHECK(matrix.weight.size(0) == rows && matrix.weight.size(1) == columns, op, name, " is ",
                   shape_text(matrix.weight), ", expected [", rows, ", ", columns, "]");
  NARROWCAST_CHECK(matrix.scale.numel() == rows && matrix.sum.numel() == rows, op, name, " has ", rows,
                   " rows; scale and sum have ", matrix.scale.numel(), " and ", matrix.sum.numel());
  NARROWCAST_CHECK(!matrix.bias || (matrix.bias->dim() == 1 && matrix.bias->numel() == rows), op,
                   "bias must have one entry per row of ", name);
}

GateWeights gate_weights(const Matrix& matrix, int8_t* panels, const RecurrentKernels& cells) {
  const int64_t rows = matrix.weight.size(0), columns = matrix.weight.size(1);
  cells.pack_rows(static_cast<const int8_t*>(matrix.weight.const_data_ptr()), rows, columns, panels);
  return {panels, static_cast<const float*>(matrix.scale.const_data_ptr()),
          static_cast<const int32_t*>(matrix.sum.const_data_ptr()),
          matrix.bias ? static_cast<const float*>(matrix.bias->const_data_ptr()) : nullptr, columns};
}

Matrix gapless(const char* op, const Matrix& matrix) {
  return {as_contiguous(matrix.weight), as_contiguous(matrix.scale), as_contiguous(matrix.sum),
          matrix.bias ? std::optional<Tensor>(as_float32(*matrix.bias, op, "bias")) : std::nullopt};
}

// A float32 copy of the first state that the call may overwrite.
Tensor first_state(const char* op, const Tensor& state, int64_t batch, int64_t hidden, const char* name) {
  float_type(state, op, name);
  NARROWCAST_CHECK(state.dim() == 2 && state.size(0) == batch && state.size(1) == hidden, op, name, " is ",
                   shape_text(state), ", expected [", batch, ", ", hidden, "]");
  const int64_t sizes[] = {batch, hidden};
  Tensor copy = empty_tensor(sizes, 2, FloatType::float32);
  torch::stable::copy_(copy, state);
  return copy;
}

void run_batch(const char* op, const RecurrentCall& call) {
  const int64_t products = call.steps * call.batch * call.gates * call.hidden * (call.inputs + call.hidden);
  const bool parallel = products > kSerialProducts;
  const int64_t threads = parallel ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  const int64_t tasks = std::max(std::min(threads, call.batch), divide_up(call.batch, kTaskRows));
  std::vector<BadRow> bad(static_cast<size_t>(tasks));
  for_each_task(tasks, parallel, [&](int64_t task) {
    const int64_t begin = call.batch * task / tasks, end = call.batch * (task + 1) / tasks;
    auto* scratch = static_cast<uint8_t*>(workspace(Slot::codes, recurrent_scratch_bytes(call, end - begin)));
    bad[static_cast<size_t>(task)] = run_rows(call, begin, end, scratch);
  });
  for (const BadRow& row : bad) {
    NARROWCAST_CHECK(!row.found, op, "Non-finite value in ", row.in_state ? "the state before step " : "x at step ",
                     row.step, ", row ", row.row, " of the batch");
  }
}

struct Result {
  Tensor y, state;
};

// `cell` is null for a GRU.
Result run_layer(const char* op, const Tensor& x, const Tensor& h0, Tensor* cell, const Matrix& input,
                 const Matrix& state, bool reverse) {
  float_type(x, op, "x");
  NARROWCAST_CHECK(x.dim() == 3, op, "x must be [steps, batch, inputs], got shape ", shape_text(x));
  NARROWCAST_CHECK(h0.dim() == 2, op, "h0 must be [batch, hidden], got shape ", shape_text(h0));
  RecurrentCall call{};
  call.steps = x.size(0), call.batch = x.size(1), call.inputs = x.size(2), call.hidden = h0.size(1);
  call.gates = cell ? 4 : 3, call.reverse = reverse;
  NARROWCAST_CHECK(call.inputs > 0 && call.hidden > 0, op, "no inputs or no hidden channels");
  check_matrix(op, input, call.gates * call.hidden, call.inputs, "weight_ih");
  check_matrix(op, state, call.gates * call.hidden, call.hidden, "weight_hh");
  Result result{Tensor(), first_state(op, h0, call.batch, call.hidden, "h0")};
  if (cell) *cell = first_state(op, *cell, call.batch, call.hidden, "c0");
  const int64_t sizes[] = {call.steps, call.batch, call.hidden};
  result.y = empty_tensor(sizes, 3, FloatType::float32);
  const Tensor values = as_float32(x, op, "x");
  const Matrix from_input = gapless(op, input), from_state = gapless(op, state);
  call.x = static_cast<const float*>(values.const_data_ptr());
  call.y = static_cast<float*>(result.y.mutable_data_ptr());
  call.hidden_state = static_cast<float*>(result.state.mutable_data_ptr());
  call.cell = cell ? static_cast<float*>(cell->mutable_data_ptr()) : nullptr;
  call.kernels = &kConvTiers.active();
  call.cells = &kRecurrentTiers.active();
  if (call.batch == 0 || call.steps == 0) return result;
  const int64_t rows = round_up(call.gates * call.hidden, 16), input_bytes = rows * round_up(call.inputs, 4);
  auto* panels = static_cast<int8_t*>(workspace(Slot::panel, input_bytes + rows * round_up(call.hidden, 4)));
  call.input = gate_weights(from_input, panels, *call.cells);
  call.state = gate_weights(from_state, panels + input_bytes, *call.cells);
  run_batch(op, call);
  return result;
}

Tensor as_type(const Tensor& values, ScalarType type) {
  return type == ScalarType::Float ? values : torch::stable::to(values, type);
}

std::tuple<Tensor, Tensor, Tensor> lstm_int8(Tensor x, Tensor h0, Tensor c0, Tensor weight_ih, Tensor scale_ih,
                                             Tensor sum_ih, Tensor weight_hh, Tensor scale_hh, Tensor sum_hh,
                                             std::optional<Tensor> bias, bool reverse) {
  const Result result = run_layer("lstm_int8", x, h0, &c0, {weight_ih, scale_ih, sum_ih, bias},
                                  {weight_hh, scale_hh, sum_hh, std::nullopt}, reverse);
  const ScalarType type = x.scalar_type();
  return {as_type(result.y, type), as_type(result.state, type), as_type(c0, type)};
}

std::tuple<Tensor, Tensor> gru_int8(Tensor x, Tensor h0, Tensor weight_ih, Tensor scale_ih, Tensor sum_ih,
                                    Tensor weight_hh, Tensor scale_hh, Tensor sum_hh, std::optional<Tensor> bias_ih,
                                    std::optional<Tensor> bias_hh, bool reverse) {
  const Result result = run_layer("gru_int8", x, h0, nullptr, {weight_ih, scale_ih, sum_ih, bias_ih},
                                  {weight_hh, scale_hh, sum_hh, bias_hh}, reverse);
  const ScalarType type = x.scalar_type();
  return {as_type(result.y, type), as_type(result.state, type)};
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("lstm_int8", TORCH_BOX(&narrowcast::lstm_int8));
  library.impl("gru_int8", TORCH_BOX(&narrowcast::gru_int8));
}
