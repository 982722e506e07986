// The time loop of LSTM and GRU: one integer product for the inputs of many steps, then per step quantize the state,
// one integer product, and the cell.
#include "recurrent_run.h"

#include <algorithm>
#include <cstring>

namespace narrowcast {
namespace {

constexpr int64_t kChunkRows = 192;  // rows of input gates computed at once
constexpr int64_t kBlockRows = 48;
constexpr float kSmallestRange = 0x1p-100f;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Work {
  const RecurrentCall& call;
  uint8_t* codes;          // [chunk rows, width rounded up to 4]
  const uint8_t** row;     // their addresses
  float* row_scale;
  float* input_gates;      // [chunk rows, gates * hidden]
  float* state_gates;      // [rows, gates * hidden]
  int32_t* sums;
};

int64_t chunk_rows(int64_t rows) { return std::max(rows, kChunkRows / std::max<int64_t>(rows, 1) * rows); }

// Symmetric codes, 128 added, of one row; false when a value is not finite.
bool quantize_row(const Work& work, const float* values, int64_t count, int64_t index) {
  const ConvKernels& kernels = *work.call.kernels;
  const uint32_t bits = kernels.magnitude_bits(values, count, 0);
  if (bits >= 0x7f800000u) return false;
  float absmax;
  std::memcpy(&absmax, &bits, 4);
  const bool zero = absmax < kSmallestRange;
  const CodeRange range{zero ? 0.0f : 127.0f / absmax, -127.0f, 127.0f, 128};
  uint8_t* codes = work.codes + index * up(count, 4);
  kernels.quantize_pixels(values, 0, count, 1, range, codes, 0);
  work.row[index] = codes;
  work.row_scale[index] = zero ? 1.0f : absmax / 127.0f;
  return true;
}

// gates[row, :] of all quantized rows.
void product(const Work& work, const GateWeights& weights, int64_t rows, float* gates) {
  const ConvKernels& kernels = *work.call.kernels;
  const int64_t outputs = work.call.gates * work.call.hidden, panels = up(outputs, kLane) / kLane, zero = 0;
  DotBlock block{};
  block.tap_offset = &zero;
  block.taps = 1;
  block.steps = up(weights.columns, 4) / 4;
  block.panel_stride = block.steps * 4 * kLane;
  block.sums = work.sums;
  const int widest = kernels.tile_vectors < 2 ? 1 : rows <= kernels.tile_rows / 2 ? kernels.tile_vectors : 2;
  for (int64_t panel = 0; panel < panels; panel += block.vectors) {
    const int64_t left = panels - panel, channel = panel * kLane;
    block.vectors = left >= widest ? widest : left >= 2 && widest > 1 ? 2 : 1;
    block.panel = weights.panels + panel * block.panel_stride;
    const int64_t channels = std::min<int64_t>(block.vectors * kLane, outputs - channel);
    for (int64_t begin = 0; begin < rows; begin += kBlockRows) {
      block.row = work.row + begin;
      block.rows = std::min(kBlockRows, rows - begin);
      kernels.dot_block(block);
      const float* bias = weights.bias ? weights.bias + channel : nullptr;
      const Epilogue epilogue{weights.scale + channel, bias, weights.sum + channel, 128, 0.0f, work.row_scale + begin};
      kernels.store_pixels(work.sums, block.vectors * kLane, block.rows, channels, epilogue,
                           gates + begin * outputs + channel, outputs);
    }
  }
}

void advance(const Work& work, int64_t row_begin, int64_t rows, const float* input_gates, int64_t time) {
  const RecurrentCall& call = work.call;
  const int64_t width = call.hidden, outputs = call.gates * width;
  for (int64_t r = 0; r < rows; ++r) {
    float* state = call.hidden_state + (row_begin + r) * width;
    const float *from_input = input_gates + r * outputs, *from_state = work.state_gates + r * outputs;
    if (call.gates == 4) {
      call.cells->lstm_cell(from_input, from_state, width, call.cell + (row_begin + r) * width, state);
    } else {
      call.cells->gru_cell(from_input, from_state, width, state);
    }
    std::memcpy(call.y + (time * call.batch + row_begin + r) * width, state, static_cast<size_t>(4 * width));
  }
}

}  // namespace

int64_t recurrent_scratch_bytes(const RecurrentCall& call, int64_t rows) {
  const int64_t chunk = chunk_rows(rows), outputs = call.gates * call.hidden;
  return up(chunk * up(std::max(call.inputs, call.hidden), 4), 64) + up(8 * chunk, 64) + up(4 * chunk, 64) +
         up(4 * chunk * outputs, 64) + up(4 * rows * outputs, 64) + kBlockRows * 4 * kLane * 4;
}

BadRow run_rows(const RecurrentCall& call, int64_t row_begin, int64_t row_end, uint8_t* scratch) {
  const int64_t rows = row_end - row_begin, chunk = chunk_rows(rows), outputs = call.gates * call.hidden;
  const auto take = [&](int64_t bytes) {
    uint8_t* at = scratch;
    scratch += up(bytes, 64);
    return at;
  };
  Work work{call, take(chunk * up(std::max(call.inputs, call.hidden), 4)),
            reinterpret_cast<const uint8_t**>(take(8 * chunk)), reinterpret_cast<float*>(take(4 * chunk)),
            reinterpret_cast<float*>(take(4 * chunk * outputs)), reinterpret_cast<float*>(take(4 * rows * outputs)),
            reinterpret_cast<int32_t*>(take(kBlockRows * 4 * kLane * 4))};
  const int64_t chunk_steps = chunk / rows;
  const auto time_of = [&](int64_t step) { return call.reverse ? call.steps - 1 - step : step; };
  for (int64_t first = 0; first < call.steps; first += chunk_steps) {
    const int64_t steps = std::min(chunk_steps, call.steps - first);
    for (int64_t i = 0; i < steps * rows; ++i) {
      const int64_t time = time_of(first + i / rows), row = row_begin + i % rows;
      const float* values = call.x + (time * call.batch + row) * call.inputs;
      if (!quantize_row(work, values, call.inputs, i)) return {true, false, time, row};
    }
    product(work, call.input, steps * rows, work.input_gates);
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t r = 0; r < rows; ++r) {
        const float* state = call.hidden_state + (row_begin + r) * call.hidden;
        if (!quantize_row(work, state, call.hidden, r)) return {true, true, time_of(first + step), row_begin + r};
      }
      product(work, call.state, rows, work.state_gates);
      advance(work, row_begin, rows, work.input_gates + step * rows * outputs, time_of(first + step));
    }
  }
  return {};
}

}  // namespace narrowcast
