// LSTM and GRU layers over short sequences.
#include "check.h"
#include "recurrent_run.h"

namespace narrowcast::test {
namespace {

struct Matrix {
  Buffer<int8_t> weight;
  Buffer<float> scale, bias;
  Buffer<int32_t> sum;
  int64_t rows, columns;

  Matrix(Random& random, int64_t rows, int64_t columns)
      : weight(rows * columns), scale(rows), bias(rows), sum(rows), rows(rows), columns(columns) {
    weight.fill([&] { return random.extreme(-127, 127); });
    scale.fill([&] { return random.unit() * 0.02f; });
    bias.fill([&] { return random.around(1.0f); });
    for (int64_t row = 0; row < rows; ++row) {
      sum[row] = 0;
      for (int64_t k = 0; k < columns; ++k) sum[row] += weight[row * columns + k];
    }
  }

  int64_t panel_bytes() const { return (rows + 15) / 16 * 16 * ((columns + 3) / 4 * 4); }

  GateWeights packed(int8_t* panels) const {
    kRecurrentTiers.active().pack_rows(weight.data(), rows, columns, panels);
    return {panels, scale.data(), sum.data(), rows % 2 == 0 ? bias.data() : nullptr, columns};
  }
};

}  // namespace

void test_recurrent(Random& random) {
  RecurrentCall shape{};
  shape.steps = random.between(1, 5), shape.batch = random.between(1, 9);
  shape.inputs = random.between(1, 60), shape.hidden = random.between(1, 50);
  shape.gates = random.chance(50) ? 4 : 3, shape.reverse = random.chance(50);
  Buffer<float> x(shape.steps * shape.batch * shape.inputs), first(shape.batch * shape.hidden);
  x.fill([&] { return random.around(3.0f); });
  first.fill([&] { return random.around(1.0f); });
  const Matrix input(random, shape.gates * shape.hidden, shape.inputs);
  const Matrix state(random, shape.gates * shape.hidden, shape.hidden);
  const int64_t outputs = shape.steps * shape.batch * shape.hidden, states = shape.batch * shape.hidden;
  const std::string what = "recurrent gates " + std::to_string(shape.gates) + " inputs " +
                           std::to_string(shape.inputs) + " hidden " + std::to_string(shape.hidden) + " batch " +
                           std::to_string(shape.batch) + " steps " + std::to_string(shape.steps);
  same_on_every_tier(what, 4 * (outputs + 2 * states), [&](uint8_t* out) {
    Buffer<int8_t> input_panels(input.panel_bytes()), state_panels(state.panel_bytes());
    Buffer<float> y(outputs), hidden(states), cell(states);
    std::memcpy(hidden.data(), first.data(), static_cast<size_t>(4 * states));
    std::memcpy(cell.data(), first.data(), static_cast<size_t>(4 * states));
    RecurrentCall call = shape;
    call.x = x.data(), call.y = y.data(), call.hidden_state = hidden.data(), call.cell = cell.data();
    call.input = input.packed(input_panels.data()), call.state = state.packed(state_panels.data());
    call.kernels = &kConvTiers.active(), call.cells = &kRecurrentTiers.active();
    Buffer<uint8_t> scratch(recurrent_scratch_bytes(call, call.batch));
    if (run_rows(call, 0, call.batch, scratch.data()).found) report(what, "a finite input was called not finite");
    std::memcpy(out, y.data(), static_cast<size_t>(4 * outputs));
    std::memcpy(out + 4 * outputs, hidden.data(), static_cast<size_t>(4 * states));
    std::memcpy(out + 4 * (outputs + states), cell.data(), static_cast<size_t>(4 * states));
  });
}

}  // namespace narrowcast::test
