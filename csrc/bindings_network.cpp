// Torch binding of conv_network_int8: whole images go to threads, or, when there are too few, the rows of every step.
#include <algorithm>
#include <cmath>
#include <vector>

#include "binding.h"
#include "network.h"

namespace narrowcast {
namespace {

constexpr const char* kOp = "conv_network_int8";
constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr int64_t kCacheBytes = 512 * 1024;  // activations of one thread: half of a 1 MiB second-level cache
constexpr double kParallelNanoseconds = 10000.0;

struct Call {
  Network network;
  int64_t batch = 0;
  std::vector<Tensor> inputs;  // as float32 that the quantizers can walk
  std::vector<float*> outputs;
};

// Whether rows can be read channel by channel or pixel by pixel.
bool set_strides(const Tensor& x, NetworkInput& input) {
  input.sample_stride = x.stride(0), input.row_stride = x.stride(2);
  input.column_stride = x.stride(3), input.channel_stride = x.stride(1);
  // A dimension of size one may have any stride.
  if (input.width == 1) input.column_stride = input.channel_stride == 1 ? input.channels : 1;
  if (input.channels == 1) input.channel_stride = input.height * input.width;
  input.interleaved = input.channel_stride == 1 && input.column_stride != 1;
  return input.interleaved || input.column_stride == 1;
}

void add_input(Call& call, const Tensor& x) {
  float_type(x, kOp, "inputs");
  NARROWCAST_CHECK(x.dim() == 4, kOp, "inputs must have 4 dimensions, got shape ", shape_text(x));
  NARROWCAST_CHECK(x.size(1) > 0 && x.size(2) > 0 && x.size(3) > 0, kOp, "an input of shape ", shape_text(x));
  NARROWCAST_CHECK(call.inputs.empty() || x.size(0) == call.batch, kOp, "inputs of ", call.batch, " and ", x.size(0),
                   " images");
  call.batch = x.size(0);
  NetworkInput input{};
  input.channels = x.size(1), input.height = x.size(2), input.width = x.size(3);
  if (x.scalar_type() == ScalarType::Float && set_strides(x, input)) {
    call.inputs.push_back(x);
  } else {
    Tensor copy = empty_tensor(x.sizes().data(), 4, FloatType::float32);
    torch::stable::copy_(copy, x);
    set_strides(copy, input);
    call.inputs.push_back(copy);
  }
  input.data = static_cast<const float*>(call.inputs.back().const_data_ptr());
  call.network.inputs.push_back(input);
}

std::vector<Tensor> new_outputs(Call& call) {
  std::vector<Tensor> outputs;
  for (const int64_t index : call.network.outputs) {
    const NetworkBuffer& buffer = call.network.buffers[static_cast<size_t>(index)];
    const int64_t sizes[] = {call.batch, buffer.channels, buffer.height, buffer.width};
    const int64_t strides[] = {buffer.channels * buffer.height * buffer.width, 1, buffer.width * buffer.channels,
                               buffer.channels};
    AtenTensorHandle handle;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, strides, aoti_torch_dtype_float32(),
                                                           aoti_torch_device_type_cpu(), 0, &handle));
    outputs.emplace_back(handle);
    call.outputs.push_back(static_cast<float*>(outputs.back().mutable_data_ptr()));
  }
  return outputs;
}

[[noreturn]] void fail_not_finite(const Call& call) {
  for (size_t i = 0; i < call.network.inputs.size(); ++i) {
    const NetworkInput& s = call.network.inputs[i];
    for (int64_t b = 0; b < call.batch; ++b) {
      for (int64_t c = 0; c < s.channels; ++c) {
        for (int64_t y = 0; y < s.height; ++y) {
          for (int64_t x = 0; x < s.width; ++x) {
            const float* row = s.data + b * s.sample_stride + c * s.channel_stride + y * s.row_stride;
            if (std::isfinite(row[x * s.column_stride])) continue;
            fail(kOp, "Non-finite value in input ", i, " at [", b, ", ", c, ", ", y, ", ", x, "]");
          }
        }
      }
    }
  }
  fail(kOp, "Non-finite value in an input");
}

Chunk make_chunk(const Call& call, int64_t first, int64_t images) {
  const int64_t bytes = images * call.network.arena_bytes + call.network.slack_bytes;
  return {call.network, kNetworkTiers.active(), kConvTiers.active(), first, images,
          static_cast<uint8_t*>(workspace(Slot::codes, bytes)), call.outputs.data()};
}

uint8_t* scratch_of(const Call& call) {
  return static_cast<uint8_t*>(workspace(Slot::panel, call.network.scratch_bytes));
}

uint32_t run_all_steps(const Call& call, int64_t first, int64_t images) {
  const Chunk chunk = make_chunk(call, first, images);
  uint8_t* scratch = scratch_of(call);
  uint32_t seen = 0;
  for (size_t i = 0; i < call.network.steps.size(); ++i) {
    fill_borders(chunk, static_cast<int64_t>(i));
    seen = std::max(seen, run_step(chunk, call.network.steps[i], 0, 1, scratch));
  }
  return seen;
}

// Too few images for the threads: they share the rows of every step that is worth it.
uint32_t run_steps_together(const Call& call, int64_t threads) {
  const Chunk chunk = make_chunk(call, 0, call.batch);
  std::atomic<uint32_t> seen{0};
  const auto note = [&](uint32_t bits) {
    if (bits >= kInfinityBits) seen.store(bits, std::memory_order_relaxed);
  };
  for (size_t i = 0; i < call.network.steps.size(); ++i) {
    const NetworkStep& step = call.network.steps[i];
    fill_borders(chunk, static_cast<int64_t>(i));
    const double cost = step_nanoseconds(call.network, step) * static_cast<double>(call.batch);
    if (threads == 1 || cost < kParallelNanoseconds) {
      note(run_step(chunk, step, 0, 1, scratch_of(call)));
      continue;
    }
    for_each_task(threads, true, [&](int64_t part) { note(run_step(chunk, step, part, threads, scratch_of(call))); });
  }
  return seen.load();
}

void run_network(const Call& call) {
  const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
  uint32_t seen = 0;
  if (call.batch < threads) {
    seen = run_steps_together(call, threads);
  } else {
    const int64_t fitting = std::max<int64_t>(1, kCacheBytes / std::max<int64_t>(1, call.network.arena_bytes));
    const int64_t chunks = std::min(call.batch, round_up(divide_up(call.batch, fitting), threads));
    std::atomic<bool> bad{false};
    for_each_task(chunks, threads > 1, [&](int64_t chunk) {
      const int64_t begin = call.batch * chunk / chunks, end = call.batch * (chunk + 1) / chunks;
      if (run_all_steps(call, begin, end - begin) >= kInfinityBits) bad.store(true, std::memory_order_relaxed);
    });
    seen = bad.load() ? kInfinityBits : 0;
  }
  if (seen >= kInfinityBits) fail_not_finite(call);
}

std::vector<Tensor> conv_network_int8(std::vector<Tensor> inputs, Tensor program, Tensor constants, Tensor panels,
                                      std::vector<int64_t>) {
  NARROWCAST_CHECK(!inputs.empty(), kOp, "no inputs");
  check_tensor(program, ScalarType::Long, 1, kOp, "program");
  check_tensor(constants, ScalarType::Float, 1, kOp, "constants");
  check_tensor(panels, ScalarType::Char, 1, kOp, "panels");
  Call call;
  for (const Tensor& x : inputs) add_input(call, x);
  const Contiguous numbers(program), floats(constants), weights(panels);
  Network& network = call.network;
  network.constants = floats.data<float>(), network.constant_count = constants.numel();
  network.panels = weights.data<int8_t>(), network.panel_bytes = panels.numel();
  read_network(network, numbers.data<int64_t>(), program.numel());
  place_buffers(network);
  std::vector<Tensor> outputs = new_outputs(call);
  if (call.batch > 0) run_network(call);
  if (inputs[0].scalar_type() == ScalarType::Float) return outputs;
  for (Tensor& output : outputs) output = torch::stable::to(output, inputs[0].scalar_type());
  return outputs;
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("conv_network_int8", TORCH_BOX(&narrowcast::conv_network_int8));
}
