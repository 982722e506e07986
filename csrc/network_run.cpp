// Steps of an integer network that are no convolution: codes of the inputs, pools, additions; and the choice of a body.
#include <algorithm>

#include "conv_plan.h"
#include "network.h"

namespace narrowcast {
namespace {

// Rows [begin, end) of all images of the chunk, cut into parts.
struct Rows {
  int64_t begin, end;

  Rows(const Chunk& chunk, int64_t height, int64_t part, int64_t parts)
      : begin(chunk.images * height * part / parts), end(chunk.images * height * (part + 1) / parts) {}
};

bool equal(const float* values, int64_t count) {
  return std::all_of(values, values + count, [&](float value) { return value == values[0]; });
}

uint32_t run_quantize(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, int32_t* zeros) {
  const NetworkInput& input = chunk.network.inputs[static_cast<size_t>(step.source)];
  const View target = view_of(chunk, step.target);
  const int64_t channels = input.channels, stride = input.interleaved ? input.column_stride : input.channel_stride;
  const float* inverse = chunk.network.constants + step.constants;
  const float* zero = inverse + channels;
  const bool one = equal(inverse, channels) && equal(zero, channels);
  const CodeRange range{inverse[0], -zero[0], 255.0f - zero[0], static_cast<int32_t>(zero[0])};
  if (!one) std::transform(zero, zero + channels, zeros, [](float z) { return static_cast<int32_t>(z); });
  const ChannelRange ranges{inverse, zeros};
  const Rows rows(chunk, target.height, part, parts);
  uint32_t seen = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / target.height, y = row % target.height;
    const float* from = input.data + (chunk.first + image) * input.sample_stride + y * input.row_stride;
    uint8_t* to = target.at(image, y, 0);
    uint32_t bits;
    if (one) {
      const auto body = input.interleaved ? chunk.conv.quantize_pixels : chunk.conv.quantize_planes;
      bits = body(from, stride, channels, target.width, range, to, target.pixel);
    } else {
      const auto body = input.interleaved ? chunk.conv.quantize_channel_pixels : chunk.conv.quantize_channel_planes;
      bits = body(from, stride, channels, target.width, ranges, to, target.pixel);
    }
    seen = std::max(seen, bits);
  }
  return seen;
}

struct Span {
  int64_t begin, count, all;  // inside the image; how many positions of the window there are
};

// The positions of a window along one axis.
Span span_of(const NetworkStep& step, int axis, int64_t output, int64_t size) {
  if (step.flags & kGlobal) return {0, size, size};
  const int64_t dilation = step.dilation[axis], before = step.padding[axis], kernel = step.kernel[axis];
  const int64_t start = output * step.stride[axis] - before;
  const auto taps_in = [&](int64_t pixels) { return dilation == 1 ? pixels : ceil_div(pixels, dilation); };
  const int64_t skipped = start < 0 ? taps_in(-start) : 0;
  const auto positions = [&](int64_t end) {
    return std::min(taps_in(std::max<int64_t>(end - start, 0)), kernel);
  };
  const int64_t count = std::max<int64_t>(positions(size) - skipped, 0);
  // What the rounding up of the output size adds beyond the padding does not count.
  const int64_t all = (step.flags & kExcludePadding) ? count : positions(size + step.padding[2 + axis]);
  return {start + skipped * dilation, count, all};
}

}  // namespace

void run_pool(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts) {
  const View source = view_of(chunk, step.source), target = view_of(chunk, step.target);
  const NetworkValue& value = chunk.network.values[static_cast<size_t>(step.source)];
  const float* constants = chunk.network.constants + step.constants;
  const int64_t channels = target.channels;
  const Rows rows(chunk, target.height, part, parts);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / target.height, y = row % target.height;
    const Span down = span_of(step, 0, y, source.height);
    for (int64_t x = 0; x < target.width; ++x) {
      const Span across = span_of(step, 1, x, source.width);
      const PoolWindow window{source.at(image, down.begin, across.begin), down.count, across.count,
                              step.dilation[0] * source.row, step.dilation[1] * source.pixel};
      uint8_t* to = target.at(image, y, x);
      if (step.kind == StepKind::max_pool) {
        if (target.coded) chunk.kernels.max_codes(window, channels, to);
        else chunk.kernels.max_floats(window, channels, reinterpret_cast<float*>(to));
        continue;
      }
      const int64_t all = down.all * across.all, outside = all - down.count * across.count;
      const AverageTerms terms{constants, constants + channels, constants + 2 * channels, constants + 3 * channels,
                               outside > 0 && source.coded ? chunk.network.constants + value.zero : nullptr,
                               static_cast<float>(outside), 1.0f / static_cast<float>(all), source.coded, target.coded};
      chunk.kernels.average(window, channels, terms, to);
    }
  }
}

void add_late_rows(const NetworkStep& step, ConstantRows& rows, FinishTail& tail) {
  if (!step.late()) return;
  tail.inverse = rows.next(), tail.zero = rows.next();
  tail.activation = static_cast<Activation>(step.activation);
}

void run_elementwise(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts) {
  const View source = view_of(chunk, step.source), target = view_of(chunk, step.target);
  const View second = step.second >= 0 ? view_of(chunk, step.second) : source;
  const View floats = step.float_target >= 0 ? view_of(chunk, step.float_target) : target;
  ConstantRows constants(chunk, step, 0);
  const float *first = constants.next(), *next = constants.next();
  AddRow add{nullptr, nullptr, nullptr, nullptr, source.pixel, second.pixel, target.pixel, floats.pixel, target.width,
             target.channels, first, next, nullptr, source.coded, second.coded};
  FinishTail tail{};
  if (step.kind == StepKind::add) {
    add.offset = constants.next(), tail.low = constants.next(), tail.high = constants.next();
    tail.target_coded = target.coded;
    add_late_rows(step, constants, tail);
  }
  const Rows rows(chunk, target.height, part, parts);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t image = row / target.height, y = row % target.height;
    const uint8_t* from = source.at(image, y, 0);
    uint8_t* to = target.at(image, y, 0);
    if (step.kind == StepKind::dequantize) {
      chunk.kernels.dequantize(from, source.pixel, reinterpret_cast<float*>(to), target.pixel, target.width,
                               target.channels, first, next);
    } else {
      add.source = from, add.second = second.at(image, y, 0), add.target = to;
      if (step.float_target >= 0) add.floats = floats.at(image, y, 0);
      chunk.kernels.add(add, tail);
    }
  }
}

uint32_t run_step(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch) {
  switch (step.kind) {
    case StepKind::quantize: return run_quantize(chunk, step, part, parts, reinterpret_cast<int32_t*>(scratch));
    case StepKind::conv: {
      const auto body = chunk.network.depthwise(step) ? run_depthwise : run_dense;
      body(chunk, step, part, parts, scratch);
      return 0;
    }
    case StepKind::max_pool:
    case StepKind::average_pool: run_pool(chunk, step, part, parts); return 0;
    default: run_elementwise(chunk, step, part, parts); return 0;
  }
}

}  // namespace narrowcast
