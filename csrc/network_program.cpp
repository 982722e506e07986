// Reads the numbers of a program into tables and checks every one of them, so that the executor needs no checks.
#include <algorithm>
#include <sstream>
#include <stdexcept>

#include "conv_plan.h"
#include "network.h"

namespace narrowcast {
namespace {

constexpr int64_t kVersion = 1, kHeader = 6, kMostRows = 1 << 16, kMostChannels = 1 << 20, kMostPixels = 1 << 15;
constexpr int64_t kMostProducts = 1 << 16;  // 255 * 127 * this < 2^31

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void reject(const Parts&... parts) {
  std::ostringstream text;
  text << "narrowcast.conv_network_int8: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

bool within(int64_t value, int64_t low, int64_t end) { return value >= low && value < end; }

struct Reader {
  Network& network;
  const int64_t* at;
  int64_t step_index = 0;

  template <class... Parts>
  void require(bool fits, const Parts&... parts) const {
    if (__builtin_expect(!fits, 0)) reject("step ", step_index, ": ", parts...);
  }

  NetworkBuffer& buffer_of(int64_t value) const {
    return network.buffers[static_cast<size_t>(network.values[static_cast<size_t>(value)].buffer)];
  }
  const NetworkValue& value(int64_t index) const { return network.values[static_cast<size_t>(index)]; }

  void read_buffers(int64_t count);
  void read_values(int64_t count);
  void read_steps(int64_t count);
  void read_outputs(int64_t count);
  void check_window(const NetworkStep& step) const;
  void check_constants(const NetworkStep& step) const;
  void check_conv(const NetworkStep& step);
  void set_border(const NetworkStep& step);
  void check_read(int64_t value_index, const char* name);
  void write(int64_t value_index, int64_t height, int64_t width);
  int64_t output_size(const NetworkStep& step, int axis) const;
  void check_step(const NetworkStep& step);
};

void Reader::read_buffers(int64_t count) {
  network.buffers.resize(static_cast<size_t>(count));
  for (NetworkBuffer& buffer : network.buffers) {
    if (!within(at[0], 1, kMostChannels) || !within(at[1], 0, 2)) reject("a buffer of ", at[0], " channels");
    buffer.channels = at[0], buffer.coded = at[1] != 0;
    at += 2;
  }
}

void Reader::read_values(int64_t count) {
  network.values.resize(static_cast<size_t>(count));
  for (NetworkValue& v : network.values) {
    v = {at[0], at[1], at[2], at[3]};
    at += 4;
    if (!within(v.buffer, 0, static_cast<int64_t>(network.buffers.size()))) reject("no buffer ", v.buffer);
    const NetworkBuffer& buffer = network.buffers[static_cast<size_t>(v.buffer)];
    const bool inside = within(v.channels, 1, kMostChannels) && within(v.offset, 0, buffer.channels) &&
                        v.offset + v.channels <= buffer.channels;
    if (!inside) reject("channels ", v.offset, " + ", v.channels, " of a buffer of ", buffer.channels);
    if (v.zero != -1 && !(within(v.zero, 0, network.constant_count) && v.zero + v.channels <= network.constant_count)) {
      reject("zero points at ", v.zero, " of ", network.constant_count, " constants");
    }
  }
}

void Reader::check_window(const NetworkStep& step) const {
  for (int axis = 0; axis < 2; ++axis) {
    require(within(step.kernel[axis], 1, kMostPixels) && within(step.stride[axis], 1, kMostPixels) &&
                within(step.dilation[axis], 1, kMostPixels),
            "its window is no window");
  }
  for (const int64_t side : step.padding) require(within(side, 0, kMostPixels), "padding ", side);
  require(step.taps() <= kMostProducts, "a window of ", step.taps(), " pixels");
  if (step.kind == StepKind::conv) return require(step.flags == 0, "a convolution with flags ", step.flags);
  require(within(step.flags, 0, 8), "flags ", step.flags);
  // Every window of a pool begins and ends inside the image.
  for (int side = 0; side < 4; ++side) {
    require((step.flags & kGlobal) || step.padding[side] < step.reach(side % 2), "a pool's padding hides windows");
  }
  require(step.kind == StepKind::max_pool || step.dilation[0] * step.dilation[1] == 1, "a dilated average");
}

void Reader::check_constants(const NetworkStep& step) const {
  const int64_t late = step.late() ? 2 : 0;
  const int64_t rows[] = {2, 4 + (step.second >= 0 ? 1 : 0) + late, 0, 4, 5 + late, 2};
  const int64_t needed = rows[static_cast<int>(step.kind)] * value(step.target).channels;
  require(step.constants >= 0 && step.constants <= network.constant_count - needed, "constants at ", step.constants,
          " of ", network.constant_count, ", needs ", needed);
}

int64_t Reader::output_size(const NetworkStep& step, int axis) const {
  const NetworkBuffer& source = buffer_of(step.source);
  const int64_t size = axis ? source.width : source.height;
  if (step.flags & kGlobal) return 1;
  const int64_t before = step.padding[axis], room = size + before + step.padding[2 + axis] - step.reach(axis);
  const int64_t stride = step.stride[axis];
  require(room >= 0, "an image of ", source.height, " x ", source.width, " is smaller than the window");
  if (!(step.flags & kCeilMode)) return room / stride + 1;
  const int64_t count = ceil_div(room, stride) + 1;
  return (count - 1) * stride >= size + before ? count - 1 : count;
}

void Reader::check_read(int64_t index, const char* name) {
  require(within(index, 0, static_cast<int64_t>(network.values.size())), "no ", name, " value ", index);
  const NetworkValue& v = value(index);
  NetworkBuffer& buffer = buffer_of(index);
  int64_t channel = v.offset;
  while (channel < v.offset + v.channels) {
    int64_t write = buffer.written;
    while (write >= 0) {
      const NetworkWrite& w = network.writes[static_cast<size_t>(write)];
      if (within(channel, w.begin, w.end)) {
        channel = w.end;
        break;
      }
      write = w.before;
    }
    require(write >= 0, "reads channel ", channel, " of buffer ", v.buffer, " before it is written");
  }
  buffer.last = step_index;
}

void Reader::write(int64_t index, int64_t height, int64_t width) {
  const NetworkValue& v = value(index);
  NetworkBuffer& buffer = buffer_of(index);
  if (buffer.written < 0) {
    buffer.height = height, buffer.width = width, buffer.first = step_index;
  }
  require(buffer.height == height && buffer.width == width, "writes ", height, " x ", width, " into a buffer of ",
          buffer.height, " x ", buffer.width);
  for (int64_t before = buffer.written; before >= 0;) {
    const NetworkWrite& w = network.writes[static_cast<size_t>(before)];
    require(v.offset >= w.end || v.offset + v.channels <= w.begin, "writes channels of buffer ", v.buffer, " again");
    before = w.before;
  }
  network.writes.push_back({v.offset, v.offset + v.channels, buffer.written});
  buffer.written = static_cast<int64_t>(network.writes.size()) - 1;
  buffer.last = step_index;
}

// Makes room around the source and notes the codes there; all readers of a channel must want the same.
void Reader::set_border(const NetworkStep& step) {
  const NetworkValue& v = value(step.source);
  NetworkBuffer& buffer = buffer_of(step.source);
  require(v.zero >= 0, "pads a value without zero points");
  require(!network.buffers.empty() && buffer.coded, "pads a float value");
  buffer.border_y = std::max({buffer.border_y, step.padding[0], step.padding[2]});
  buffer.border_x = std::max({buffer.border_x, step.padding[1], step.padding[3]});
  const int64_t bytes = buffer.pixel_bytes();
  if (buffer.border < 0) {
    buffer.border = static_cast<int64_t>(network.borders.size());
    network.borders.resize(network.borders.size() + 2 * static_cast<size_t>(bytes));
  }
  uint8_t* code = network.borders.data() + buffer.border + v.offset;
  uint8_t* known = code + bytes;
  const float* zero = network.constants + v.zero;
  for (int64_t c = 0; c < v.channels; ++c) {
    require(zero[c] >= 0.0f && zero[c] <= 255.0f, "a zero point of ", zero[c]);
    const auto wanted = static_cast<uint8_t>(zero[c]);
    require(!known[c] || code[c] == wanted, "two zero points for channel ", v.offset + c, " of buffer ", v.buffer);
    code[c] = wanted, known[c] = 1;
  }
}

void Reader::check_conv(const NetworkStep& step) {
  const NetworkValue &source = value(step.source), &target = value(step.target);
  require(buffer_of(step.source).coded, "a convolution of float values");
  require(within(step.groups, 1, kMostChannels) && source.channels % step.groups == 0 &&
              target.channels % step.groups == 0,
          step.groups, " groups for ", source.channels, " and ", target.channels, " channels");
  const int64_t inputs = source.channels / step.groups;
  require(inputs * step.taps() <= kMostProducts, "sums of ", inputs * step.taps(), " products");
  const int64_t bytes = packed_bytes(target.channels, inputs, step.taps(), step.groups);
  require(step.panels >= 0 && step.panels <= network.panel_bytes - bytes, "weights at ", step.panels, " of ",
          network.panel_bytes, " bytes, needs ", bytes);
  if (step.padded()) set_border(step);
}

void Reader::check_step(const NetworkStep& step) {
  const StepKind kind = step.kind;
  require(within(step.target, 0, static_cast<int64_t>(network.values.size())), "no target value ", step.target);
  const NetworkValue& target = value(step.target);
  const bool target_coded = buffer_of(step.target).coded;
  require(kind == StepKind::conv || kind == StepKind::add || !step.late(), "activates what is no sum");
  require(within(step.activation, 0, 4), "activation ", step.activation);
  check_constants(step);
  if (kind == StepKind::quantize) {
    require(within(step.source, 0, static_cast<int64_t>(network.inputs.size())), "no input ", step.source);
    const NetworkInput& input = network.inputs[static_cast<size_t>(step.source)];
    require(target_coded && target.channels == buffer_of(step.target).channels, "codes must fill a buffer");
    require(input.channels == target.channels, "an input of ", input.channels, " channels, not ", target.channels);
    require(step.second < 0, "a second source");
    return write(step.target, input.height, input.width);
  }
  check_read(step.source, "source");
  const NetworkBuffer& from = buffer_of(step.source);
  const bool windowed = kind == StepKind::conv || kind == StepKind::max_pool || kind == StepKind::average_pool;
  if (windowed) check_window(step);
  const int64_t height = windowed ? output_size(step, 0) : from.height;
  const int64_t width = windowed ? output_size(step, 1) : from.width;
  if (kind == StepKind::conv) check_conv(step);
  else require(value(step.source).channels == target.channels, "another number of channels");
  if (kind == StepKind::max_pool) require(from.coded == target_coded, "a maximum of codes is a code");
  if (kind == StepKind::dequantize) require(from.coded && !target_coded, "dequantizes codes to floats");
  const bool pads_sums = kind == StepKind::average_pool && from.coded && !(step.flags & kExcludePadding);
  if (pads_sums && step.padded()) require(value(step.source).zero >= 0, "pads a value without zero points");
  require(kind == StepKind::add ? step.second >= 0 : kind == StepKind::conv || step.second < 0, "second ", step.second);
  if (step.second >= 0) {
    check_read(step.second, "second");
    const NetworkBuffer& second = buffer_of(step.second);
    require(value(step.second).channels == target.channels && second.height == height && second.width == width,
            "the second source has another size");
  }
  write(step.target, height, width);
  if (step.float_target < 0) return;
  require(step.float_target < static_cast<int64_t>(network.values.size()), "no float target ", step.float_target);
  require(target_coded && !buffer_of(step.float_target).coded && value(step.float_target).channels == target.channels,
          "a float target goes with codes of as many channels");
  write(step.float_target, height, width);
}

void Reader::read_steps(int64_t count) {
  network.steps.reserve(static_cast<size_t>(count));
  for (; step_index < count; ++step_index, at += 20) {
    require(within(at[0], 0, 6), "kind ", at[0]);
    network.steps.push_back({static_cast<StepKind>(at[0]), at[1], at[2], at[3], at[4], at[5], at[6], at[7],
                             {at[8], at[9]}, {at[10], at[11]}, {at[12], at[13], at[14], at[15]}, {at[16], at[17]},
                             at[18], at[19]});
    check_step(network.steps.back());
  }
}

void Reader::read_outputs(int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    check_read(at[i], "output");
    const NetworkValue& v = value(at[i]);
    NetworkBuffer& buffer = buffer_of(at[i]);
    require(!buffer.coded && v.channels == buffer.channels && buffer.output < 0, "output ", i,
            " must be a float buffer of its own");
    buffer.output = i;
    network.outputs.push_back(v.buffer);
  }
}

}  // namespace

void read_network(Network& network, const int64_t* numbers, int64_t count) {
  if (count < kHeader || numbers[0] != kVersion) reject("not a program of version ", kVersion);
  for (int i = 1; i < kHeader; ++i) {
    if (!within(numbers[i], 0, kMostRows)) reject("a table of ", numbers[i], " rows");
  }
  const int64_t buffers = numbers[2], values = numbers[3], steps = numbers[4], outputs = numbers[5];
  if (count != kHeader + 2 * buffers + 4 * values + 20 * steps + outputs) reject("a program of ", count, " numbers");
  if (numbers[1] != static_cast<int64_t>(network.inputs.size())) {
    reject("a program for ", numbers[1], " inputs, got ", network.inputs.size());
  }
  Reader reader{network, numbers + kHeader};
  network.writes.reserve(static_cast<size_t>(steps));
  reader.read_buffers(buffers);
  reader.read_values(values);
  reader.read_steps(steps);
  reader.read_outputs(outputs);
}

}  // namespace narrowcast
