// A whole integer network as one call: its program in checked form, where its buffers lie, and the body of one step.
// The numbers of a program are defined in narrowcast.kernels.network. Free of torch.
#pragma once

#include <stdint.h>

#include <utility>
#include <vector>

#include "network_kernels.h"

namespace narrowcast {

enum class StepKind : int { quantize = 0, conv = 1, max_pool = 2, average_pool = 3, add = 4, dequantize = 5 };

constexpr int64_t kCeilMode = 1, kExcludePadding = 2, kGlobal = 4;

struct NetworkInput {
  const float* data;
  int64_t channels, height, width;
  int64_t sample_stride, channel_stride, row_stride, column_stride;  // in floats
  bool interleaved;  // channel_stride is 1; else column_stride is 1
};

// Images one after the other: [height + border_y][width + border_x] pixels each, the borders before the pixels. A
// row's border is also the right one of the row before it, an image's the bottom one of the image before it.
struct NetworkBuffer {
  int64_t channels;
  bool coded;
  int64_t height = 0, width = 0;  // 0: nothing has been written
  int64_t border_y = 0, border_x = 0;
  int64_t first = 0, last = 0;  // steps between which it is alive
  int64_t written = -1;         // its latest write in Network::writes
  int64_t border = -1;          // of the codes of its border pixels in Network::borders
  int64_t place = 0;            // in the arena of one image
  int64_t output = -1;          // its number when it is an output

  int64_t pixel_bytes() const { return coded ? (channels + 3) / 4 * 4 : 4 * channels; }
  int64_t row_bytes() const { return (width + border_x) * pixel_bytes(); }
  int64_t image_bytes() const { return (height + border_y) * row_bytes(); }
  int64_t edge_bytes() const { return border_y * row_bytes() + border_x * pixel_bytes(); }
};

struct NetworkValue {
  int64_t channels, buffer, offset, zero;
};

struct NetworkStep {
  StepKind kind;
  int64_t source, second, target, constants, panels, activation, groups;
  int64_t kernel[2], stride[2], padding[4], dilation[2], flags, float_target;

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t reach(int axis) const { return dilation[axis] * (kernel[axis] - 1) + 1; }
  // Whether the sum is a float in the network's units before it becomes a code.
  bool late() const { return activation != 0 || float_target >= 0; }
  bool padded() const { return (padding[0] | padding[1] | padding[2] | padding[3]) != 0; }
};

struct NetworkWrite {
  int64_t begin, end, before;  // channels; the write before this one to the same buffer
};

struct Network {
  std::vector<NetworkInput> inputs;
  std::vector<NetworkBuffer> buffers;
  std::vector<NetworkValue> values;
  std::vector<NetworkStep> steps;
  std::vector<int64_t> outputs;
  std::vector<NetworkWrite> writes;
  std::vector<uint8_t> borders;
  const float* constants;
  int64_t constant_count;
  const int8_t* panels;
  int64_t panel_bytes;
  int64_t arena_bytes = 0;    // of one image
  int64_t slack_bytes = 0;    // behind the arena: vectors are read beyond the last pixel
  int64_t scratch_bytes = 0;  // of one thread

  bool depthwise(const NetworkStep& step) const {
    const int64_t channels = values[static_cast<size_t>(step.source)].channels;
    return step.groups == channels && values[static_cast<size_t>(step.target)].channels == channels;
  }
};

// Reads `count` numbers into the tables; inputs, constants and panels are set. Throws std::runtime_error when anything
// does not fit: whatever a program says, a network that was read touches only its own memory.
void read_network(Network& network, const int64_t* numbers, int64_t count);

// Places the buffers of one image: those alive at the same time do not overlap. Sets the sizes.
void place_buffers(Network& network);

// Some images on their way through the network.
struct Chunk {
  const Network& network;
  const NetworkKernels& kernels;
  const ConvKernels& conv;
  int64_t first, images;
  uint8_t* arena;           // images * arena_bytes + slack_bytes
  float* const* outputs;    // of the whole batch
};

// The pixels of a value: pixel (0, 0) of the chunk's first image, and how far it is to the next ones in bytes.
struct View {
  uint8_t* data;
  int64_t image, row, pixel;
  int64_t height, width, channels;
  bool coded;

  uint8_t* at(int64_t image_index, int64_t y, int64_t x) const {
    return data + image_index * image + y * row + x * pixel;
  }
};
View view_of(const Chunk& chunk, int64_t value);

// Fills the borders of the buffers whose first write this step is.
void fill_borders(const Chunk& chunk, int64_t step);
// About how long a step takes per image.
double step_nanoseconds(const Network& network, const NetworkStep& step);
// Runs part `part` of `parts` of one step; returns kNonFiniteBits or more when an input holds a value that is not
// finite. `scratch` has scratch_bytes.
uint32_t run_step(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch);

// The bodies of run_step.
void run_dense(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch);
void run_depthwise(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch);
void run_pool(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts);
void run_elementwise(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts);

// The constants of a step, row by row, from channel `channel` on.
struct ConstantRows {
  const float* at;
  int64_t channels;

  ConstantRows(const Chunk& chunk, const NetworkStep& step, int64_t channel)
      : at(chunk.network.constants + step.constants + channel),
        channels(chunk.network.values[static_cast<size_t>(step.target)].channels) {}
  const float* next() { return std::exchange(at, at + channels); }
};
// The rest of a tail whose low and high are known.
void add_late_rows(const NetworkStep& step, ConstantRows& rows, FinishTail& tail);
// Scratch of a convolution.
int64_t dense_scratch(const NetworkStep& step);
int64_t depthwise_scratch(const Network& network, const NetworkStep& step);
// Bytes behind its source that a depthwise convolution may read.
int64_t depthwise_overrun(const Network& network, const NetworkStep& step);

}  // namespace narrowcast
