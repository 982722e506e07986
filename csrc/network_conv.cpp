// Convolution steps of an integer network: codes are read where they lie, sums of a block of pixels go through an L1
// buffer to the epilogue.
#include <algorithm>

#include "conv_plan.h"
#include "network.h"

namespace narrowcast {
namespace {

constexpr int64_t kBlockPixels = 48;  // sums kept between dot products and epilogue
constexpr int64_t kWidest = 4 * kLane;

// A block of output pixels: where their windows begin, and the runs of them that are neighbours.
struct BlockPixels {
  const uint8_t* source[kBlockPixels];
  PixelRun runs[kBlockPixels];
  int64_t count, run_count;
};

// Where a step is in the images.
struct Cursor {
  int64_t image, y, x;

  Cursor(int64_t pixel, const View& view)
      : image(pixel / (view.height * view.width)), y(pixel / view.width % view.height), x(pixel % view.width) {}
};

struct StepViews {
  View source, target, second, floats;
  int64_t top, left, stride_h, stride_w;
  bool copied;  // there is a float copy

  StepViews(const Chunk& chunk, const NetworkStep& step)
      : source(view_of(chunk, step.source)),
        target(view_of(chunk, step.target)),
        second(step.second >= 0 ? view_of(chunk, step.second) : target),
        floats(step.float_target >= 0 ? view_of(chunk, step.float_target) : target),
        top(step.padding[0]), left(step.padding[1]), stride_h(step.stride[0]), stride_w(step.stride[1]),
        copied(step.float_target >= 0) {}

  int64_t pixels(const Chunk& chunk) const { return chunk.images * target.height * target.width; }

  PixelRun run_at(const Cursor& at, int64_t pixels) const {
    return {pixels, target.at(at.image, at.y, at.x), second.at(at.image, at.y, at.x),
            copied ? floats.at(at.image, at.y, at.x) : nullptr};
  }

  // The next `count` pixels.
  void next_block(Cursor& at, int64_t count, BlockPixels& block) const {
    block.count = count, block.run_count = 0;
    const int64_t step = stride_w * source.pixel;
    for (int64_t done = 0; done < count;) {
      const int64_t run = std::min(count - done, target.width - at.x);
      block.runs[block.run_count++] = run_at(at, run);
      const uint8_t* from = source.at(at.image, at.y * stride_h - top, at.x * stride_w - left);
      for (int64_t i = done; i < done + run; ++i, from += step) block.source[i] = from;
      done += run, at.x += run;
      if (at.x == target.width) {
        at.x = 0;
        if (++at.y == target.height) at.y = 0, ++at.image;
      }
    }
  }

  FinishBlock finish(const PixelRun* runs, int64_t run_count, int64_t channel) const {
    return {nullptr, 0, 0, runs, run_count, target.pixel, second.pixel, floats.pixel,
            channel * (target.coded ? 1 : 4), channel * (second.coded ? 1 : 4), channel * 4};
  }
};

FinishTerms finish_terms(const Chunk& chunk, const StepViews& views, const NetworkStep& step, int64_t channel) {
  ConstantRows rows(chunk, step, channel);
  FinishTerms terms{};
  terms.multiplier = rows.next(), terms.offset = rows.next();
  terms.tail.low = rows.next(), terms.tail.high = rows.next();
  if (step.second >= 0) terms.second_multiplier = rows.next();
  terms.second_coded = views.second.coded, terms.tail.target_coded = views.target.coded;
  add_late_rows(step, rows, terms.tail);
  return terms;
}

// Neighbouring taps whose bytes follow each other are one long tap. `first`: bytes from a pixel to its group's inputs.
void set_taps(const View& source, const NetworkStep& step, int64_t inputs, int64_t first, DotBlock& block,
              int64_t* tap_offset) {
  const int64_t codes = padded(inputs, 4);
  const bool merge = step.dilation[1] == 1 && step.groups == 1 && source.pixel == codes;
  block.steps = codes / 4 * (merge ? step.kernel[1] : 1);
  block.taps = 0;
  for (int64_t y = 0; y < step.kernel[0]; ++y) {
    for (int64_t x = 0; x < (merge ? 1 : step.kernel[1]); ++x) {
      tap_offset[block.taps++] = first + y * step.dilation[0] * source.row + x * step.dilation[1] * source.pixel;
    }
  }
  block.tap_offset = tap_offset;
}

}  // namespace

int64_t dense_scratch(const NetworkStep& step) {
  return kBlockPixels * kWidest * 4 + padded(8 * step.taps(), 64);
}

void run_dense(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch) {
  const StepViews views(chunk, step);
  const int64_t inputs = views.source.channels / step.groups, outputs = views.target.channels / step.groups;
  const int64_t group_panels = ceil_div(outputs, kLane), panel_bytes = kLane * step.taps() * padded(inputs, 4);
  DotBlock dot{};
  dot.sums = reinterpret_cast<int32_t*>(scratch);
  dot.panel_stride = panel_bytes;
  auto* tap_offset = reinterpret_cast<int64_t*>(scratch + kBlockPixels * kWidest * 4);
  int64_t taps_group = -1;
  const int64_t pixels = views.pixels(chunk), tile = chunk.conv.tile_rows;
  const int64_t widest = chunk.conv.tile_vectors < 2 ? 1 : pixels <= tile / 2 ? chunk.conv.tile_vectors : 2;
  // Few pixels: the parts share the output channels instead.
  const bool by_channels = parts > 1 && pixels < 2 * tile * parts;
  const int64_t total_panels = step.groups * group_panels;
  const int64_t first_panel = by_channels ? total_panels * part / parts : 0;
  const int64_t end_panel = by_channels ? total_panels * (part + 1) / parts : total_panels;
  const int64_t begin = by_channels ? 0 : pixels * part / parts;
  const int64_t end = by_channels ? pixels : pixels * (part + 1) / parts;
  BlockPixels pixel_block;
  Cursor cursor(begin, views.target);
  for (int64_t at = begin; at < end; at += kBlockPixels) {
    views.next_block(cursor, std::min(kBlockPixels, end - at), pixel_block);
    for (int64_t panel = first_panel; panel < end_panel; panel += dot.vectors) {
      const int64_t group = panel / group_panels, within = panel % group_panels, channel = within * kLane;
      const int64_t left = std::min(group_panels - within, end_panel - panel);
      dot.vectors = static_cast<int>(left >= 4 && widest >= 4 ? 4 : left >= 2 && widest >= 2 ? 2 : 1);
      dot.row = pixel_block.source, dot.rows = pixel_block.count;
      dot.panel = chunk.network.panels + step.panels + panel * panel_bytes;
      if (group != taps_group) set_taps(views.source, step, inputs, group * inputs, dot, tap_offset);
      taps_group = group;
      chunk.conv.dot_block(dot);
      const int64_t first = group * outputs + channel;
      FinishBlock block = views.finish(pixel_block.runs, pixel_block.run_count, first);
      block.sums = dot.sums, block.sums_stride = dot.vectors * kLane;
      block.channels = std::min(dot.vectors * int64_t{kLane}, outputs - channel);
      chunk.kernels.finish(block, finish_terms(chunk, views, step, first));
    }
  }
}

namespace {

constexpr int64_t kBandBytes = 24 * 1024;

ConvShape depthwise_shape(const NetworkStep& step, int64_t out_width) {
  ConvShape s{};
  s.out_width = out_width;
  s.kernel_h = step.kernel[0], s.kernel_w = step.kernel[1], s.stride_h = step.stride[0], s.stride_w = step.stride[1];
  s.dilation_h = step.dilation[0], s.dilation_w = step.dilation[1];
  return s;
}

// Output rows whose interleaved input rows stay in the first-level cache.
int64_t band_rows(const NetworkStep& step, int64_t word_bytes) {
  const int64_t rows = (kBandBytes / word_bytes - step.reach(0)) / step.stride[0] + 1;
  return std::max<int64_t>(rows, 1);
}

}  // namespace

int64_t depthwise_scratch(const Network& network, const NetworkStep& step) {
  const NetworkValue& target = network.values[static_cast<size_t>(step.target)];
  const int64_t width = network.buffers[static_cast<size_t>(target.buffer)].width;
  const DepthwiseLayout layout = depthwise_layout(depthwise_shape(step, width));
  const int64_t word_bytes = layout.words * 64;
  const int64_t rows = (band_rows(step, word_bytes) - 1) * step.stride[0] + step.reach(0);
  return (rows + 1) * word_bytes + layout.phases * step.kernel[0] * layout.span * 64 + (width + 4) * 64 + 256;
}

int64_t depthwise_overrun(const Network& network, const NetworkStep& step) {
  const NetworkValue& target = network.values[static_cast<size_t>(step.target)];
  const NetworkValue& source = network.values[static_cast<size_t>(step.source)];
  const int64_t width = network.buffers[static_cast<size_t>(target.buffer)].width;
  const DepthwiseLayout layout = depthwise_layout(depthwise_shape(step, width));
  // Whole words of pixels are read, of which the last outputs need only a part.
  const int64_t needed = (width - 1) * step.stride[1] + step.reach(1);
  return (4 * layout.words - needed) * network.buffers[static_cast<size_t>(source.buffer)].pixel_bytes();
}

void run_depthwise(const Chunk& chunk, const NetworkStep& step, int64_t part, int64_t parts, uint8_t* scratch) {
  const StepViews views(chunk, step);
  const View& target = views.target;
  const DepthwiseLayout layout = depthwise_layout(depthwise_shape(step, target.width));
  const int64_t word_bytes = layout.words * 64, band = band_rows(step, word_bytes), height = target.height;
  DepthwiseRow row{};
  row.row_stride = step.dilation[0] * word_bytes;
  row.kernel_rows = static_cast<int>(step.kernel[0]);
  row.phases = layout.phases, row.span = layout.span, row.advance = layout.advance, row.width = target.width;
  std::copy(layout.first, layout.first + 4, row.first);
  auto* weights = reinterpret_cast<int8_t*>(scratch);
  scratch += layout.phases * step.kernel[0] * layout.span * 64;
  row.weights = weights, row.sums = reinterpret_cast<int32_t*>(scratch);
  uint8_t* words = scratch + padded((target.width + 4) * 64, 64);
  const int64_t rows = chunk.images * height, begin = rows * part / parts, end = rows * (part + 1) / parts;
  for (int64_t c = 0; c < target.channels; c += kLane) {
    const int8_t* taps = chunk.network.panels + step.panels + c * step.taps();
    chunk.conv.depthwise_weights(taps, static_cast<int>(step.kernel[1]), static_cast<int>(step.dilation[1]),
                                 static_cast<int>(step.stride[1]), row, weights);
    const FinishTerms terms = finish_terms(chunk, views, step, c);
    const int64_t channels = std::min<int64_t>(kLane, target.channels - c);
    for (int64_t at = begin; at < end;) {
      const Cursor start(at * target.width, target);
      const int64_t image = start.image, y = start.y, count = std::min({band, end - at, height - y});
      const int64_t needed = (count - 1) * step.stride[0] + step.reach(0);
      for (int64_t i = 0; i < needed; ++i) {
        const uint8_t* from = views.source.at(image, y * step.stride[0] - views.top + i, -views.left) + c;
        chunk.conv.interleave_words(from, views.source.pixel, layout.words, words + i * word_bytes);
      }
      for (int64_t i = 0; i < count; ++i) {
        row.words = words + i * step.stride[0] * word_bytes;
        Cursor cursor = start;
        cursor.y += i;
        const PixelRun run = views.run_at(cursor, target.width);
        const int stride = static_cast<int>(step.stride[1]);
        uint8_t* const codes = run.target + c;
        if (channels == kLane &&
            chunk.kernels.depthwise_codes(row, layout.square, stride, terms, codes, target.pixel)) {
          continue;
        }
        chunk.conv.depthwise_row(row, layout.square, stride);
        FinishBlock block = views.finish(&run, 1, c);
        block.sums = row.sums, block.sums_stride = kLane, block.channels = channels;
        chunk.kernels.finish(block, terms);
      }
      at += count;
    }
  }
}

}  // namespace narrowcast
