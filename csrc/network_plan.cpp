// Memory of an integer network: buffers placed by their lifetimes, borders filled, scratch sizes.
#include <algorithm>
#include <cstring>

#include "conv_plan.h"
#include "network.h"

namespace narrowcast {
namespace {

constexpr int64_t kAlign = 64;

// Of one image; several images together need no more than so many times this.
int64_t buffer_bytes(const NetworkBuffer& buffer) {
  return padded(buffer.image_bytes() + buffer.edge_bytes() + kAlign, kAlign);
}

struct Placed {
  int64_t begin, end, last;
};

}  // namespace

void place_buffers(Network& network) {
  std::vector<size_t> order;
  for (size_t i = 0; i < network.buffers.size(); ++i) {
    const NetworkBuffer& buffer = network.buffers[i];
    if (buffer.written >= 0 && buffer.output < 0) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return network.buffers[a].first < network.buffers[b].first; });
  std::vector<Placed> alive;  // by address
  for (const size_t index : order) {
    NetworkBuffer& buffer = network.buffers[index];
    std::erase_if(alive, [&](const Placed& other) { return other.last < buffer.first; });
    const int64_t bytes = buffer_bytes(buffer);
    int64_t begin = 0;
    size_t position = 0;
    while (position < alive.size() && alive[position].begin - begin < bytes) begin = alive[position++].end;
    alive.insert(alive.begin() + static_cast<int64_t>(position), {begin, begin + bytes, buffer.last});
    buffer.place = begin;
    network.arena_bytes = std::max(network.arena_bytes, begin + bytes);
  }
  network.slack_bytes = 256;
  for (const NetworkStep& step : network.steps) {
    int64_t bytes = 0;
    if (step.kind == StepKind::quantize) {
      bytes = 4 * network.values[static_cast<size_t>(step.target)].channels;
    } else if (step.kind == StepKind::conv && network.depthwise(step)) {
      bytes = depthwise_scratch(network, step);
      network.slack_bytes = std::max(network.slack_bytes, depthwise_overrun(network, step) + 256);
    } else if (step.kind == StepKind::conv) {
      bytes = dense_scratch(step);
    }
    network.scratch_bytes = std::max(network.scratch_bytes, bytes);
  }
}

View view_of(const Chunk& chunk, int64_t index) {
  const NetworkValue& value = chunk.network.values[static_cast<size_t>(index)];
  const NetworkBuffer& buffer = chunk.network.buffers[static_cast<size_t>(value.buffer)];
  const int64_t image = buffer.image_bytes();
  uint8_t* data = buffer.output < 0
                      ? chunk.arena + buffer.place * chunk.images + buffer.edge_bytes()
                      : reinterpret_cast<uint8_t*>(chunk.outputs[buffer.output]) + chunk.first * image;
  return {data + value.offset * (buffer.coded ? 1 : 4), image, buffer.row_bytes(), buffer.pixel_bytes(),
          buffer.height, buffer.width, value.channels, buffer.coded};
}

void fill_borders(const Chunk& chunk, int64_t step) {
  const Network& network = chunk.network;
  const NetworkStep& writer = network.steps[static_cast<size_t>(step)];
  const NetworkValue& target = network.values[static_cast<size_t>(writer.target)];
  const NetworkBuffer& buffer = network.buffers[static_cast<size_t>(target.buffer)];
  if (buffer.border < 0 || buffer.first != step) return;
  const int64_t pixel = buffer.pixel_bytes(), edge = buffer.edge_bytes(), row = buffer.row_bytes();
  const int64_t gap = buffer.border_x * pixel;
  uint8_t* begin = chunk.arena + buffer.place * chunk.images;
  std::memcpy(begin, network.borders.data() + buffer.border, static_cast<size_t>(pixel));
  for (int64_t done = pixel; done < edge; done *= 2) {
    std::memcpy(begin + done, begin, static_cast<size_t>(std::min(done, edge - done)));
  }
  for (int64_t image = 0; image < chunk.images; ++image) {
    uint8_t* first = begin + edge + image * buffer.image_bytes();
    for (int64_t y = 0; gap > 0 && y < buffer.height; ++y) {
      std::memcpy(first + (y + 1) * row - gap, begin, static_cast<size_t>(gap));
    }
    // The rows below the last one; its own right border is part of them when there are none.
    std::memcpy(first + buffer.height * row - gap, begin, static_cast<size_t>(edge));
  }
}

double step_nanoseconds(const Network& network, const NetworkStep& step) {
  const NetworkValue& target = network.values[static_cast<size_t>(step.target)];
  const NetworkBuffer& buffer = network.buffers[static_cast<size_t>(target.buffer)];
  const auto outputs = static_cast<double>(buffer.height * buffer.width * target.channels);
  double products = 0.0;
  if (step.kind == StepKind::conv) {
    const int64_t inputs = network.values[static_cast<size_t>(step.source)].channels / step.groups;
    products = outputs * static_cast<double>(step.taps() * inputs);
  } else if (step.kind == StepKind::max_pool || step.kind == StepKind::average_pool) {
    products = outputs * static_cast<double>(step.taps());
  }
  return products / 150.0 + outputs / 10.0;
}

}  // namespace narrowcast
