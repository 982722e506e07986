// One task of a depthwise convolution: for each block of 16 channels, quantize the rows it needs, interleave them to
// four-pixel words, then compute output rows.
#include <algorithm>
#include <cstring>

#include "conv_plan.h"

namespace narrowcast {
namespace {

struct Block {
  const ConvCall& call;
  const DepthwiseLayout& layout;
  int64_t sample, channel, channels;
  uint8_t* words;   // [rows][layout.words][16][4]
  uint8_t* pixels;  // one row, [4 * layout.words][16]; its padding is already written
  uint32_t seen = 0;
};

void fill_row(Block& block, int64_t padded_row, uint8_t* words) {
  const ConvShape& s = block.call.shape;
  const ConvKernels& kernels = *block.call.kernels;
  const CodeRange range = block.call.range[block.sample];
  const int64_t up_row = padded_row - s.top, row = up_row / s.up_h, pixels = 4 * block.layout.words;
  if (up_row < 0 || row >= s.height || up_row % s.up_h != 0) {
    std::memset(words, range.zero_point, static_cast<size_t>(pixels * kLane));
    return;
  }
  const float* source = block.call.input + block.sample * s.sample_stride + block.channel * s.channel_stride +
                        row * s.row_stride;
  const int64_t used = std::min(s.width, ceil_div(pixels - s.left, s.up_w));
  uint8_t* to = block.pixels + s.left * kLane;
  const auto quantize = s.interleaved ? kernels.quantize_pixels : kernels.quantize_planes;
  const int64_t stride = s.interleaved ? s.column_stride : s.channel_stride;
  const uint32_t seen = quantize(source, stride, block.channels, used, range, to, kLane * s.up_w);
  block.seen = std::max(block.seen, seen);
  kernels.interleave_words(block.pixels, kLane, block.layout.words, words);
}

void compute_rows(const Block& block, DepthwiseRow& row, int64_t row_begin, int64_t row_end) {
  const ConvCall& call = block.call;
  const ConvShape& s = call.shape;
  const int64_t plane = s.out_height * s.out_width, c = block.channel;
  const Epilogue epilogue{call.scale + c, call.bias ? call.bias + c : nullptr, call.weight_sum + c,
                          call.range[block.sample].zero_point, call.input_scale[block.sample], nullptr};
  for (int64_t y = row_begin; y < row_end; ++y) {
    row.words = block.words + (y - row_begin) * s.stride_h * block.layout.words * 64;
    call.kernels->depthwise_row(row, block.layout.square, static_cast<int>(s.stride_w));
    const int64_t at = y * s.out_width;
    if (s.channels_last) {
      float* to = call.output + (block.sample * plane + at) * s.channels + c;
      call.kernels->store_pixels(row.sums, kLane, s.out_width, block.channels, epilogue, to, s.channels);
    } else {
      float* to = call.output + (block.sample * s.channels + c) * plane + at;
      call.kernels->store_planes(row.sums, kLane, s.out_width, block.channels, epilogue, to, plane);
    }
  }
}

}  // namespace

uint32_t depthwise_task(const ConvCall& call, const ConvPlan& plan, int64_t index, uint8_t* scratch) {
  const ConvShape& s = call.shape;
  const DepthwiseLayout layout = depthwise_layout(s);
  const int64_t blocks = ceil_div(s.channels, kLane), units = s.batch * blocks;
  const int64_t part = index / plan.channel_tasks, unit_part = index % plan.channel_tasks;
  const int64_t row_begin = s.out_height * part / plan.row_tasks, row_end = s.out_height * (part + 1) / plan.row_tasks;
  const int64_t rows = (row_end - row_begin - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h + 1;
  const int64_t row_bytes = layout.words * 64;
  DepthwiseRow row{};
  row.row_stride = s.dilation_h * row_bytes;
  row.kernel_rows = static_cast<int>(s.kernel_h);
  row.phases = layout.phases;
  row.span = layout.span;
  std::copy(layout.first, layout.first + 4, row.first);
  row.advance = layout.advance;
  row.width = s.out_width;
  row.sums = reinterpret_cast<int32_t*>(scratch);
  scratch += padded(s.out_width, 4) * 64;
  int8_t* weights = reinterpret_cast<int8_t*>(scratch);
  row.weights = weights;
  scratch += layout.phases * s.kernel_h * layout.span * 64;
  uint32_t seen = 0;
  const int64_t end = units * (unit_part + 1) / plan.channel_tasks;
  for (int64_t unit = units * unit_part / plan.channel_tasks; unit < end; ++unit) {
    const int64_t channel = unit % blocks * kLane;
    Block block{call, layout, unit / blocks, channel, std::min<int64_t>(kLane, s.channels - channel),
                scratch + row_bytes, scratch};
    std::memset(block.pixels, call.range[block.sample].zero_point, static_cast<size_t>(row_bytes));
    for (int64_t i = 0; i < rows; ++i) fill_row(block, row_begin * s.stride_h + i, block.words + i * row_bytes);
    const int8_t* taps = call.packed + channel * s.kernel_h * s.kernel_w;
    call.kernels->depthwise_weights(taps, static_cast<int>(s.kernel_w), static_cast<int>(s.dilation_w),
                                    static_cast<int>(s.stride_w), row, weights);
    compute_rows(block, row, row_begin, row_end);
    seen = std::max(seen, block.seen);
  }
  return seen;
}

}  // namespace narrowcast
