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
  uint8_t* plane;   // the rows of a narrow planar input without padding, [rows * width][16]
  uint8_t zero_pixel[kLane] = {};     // one pixel, and
  uint8_t zero_word[4 * kLane] = {};  // one word of nothing but padding
  uint32_t seen = 0;

  // Lets every later row that is quantized into `pixels` have its padding around it.
  void write_padding() {
    const int32_t* zeros = call.channel_range.zero_point;
    for (int64_t c = 0; c < channels; ++c) {
      zero_pixel[c] = static_cast<uint8_t>(zeros ? zeros[channel + c] : call.range[sample].zero_point);
    }
    for (int64_t i = 0; i < 4 * layout.words; ++i) std::memcpy(pixels + i * kLane, zero_pixel, kLane);
    call.kernels->interleave_words(pixels, kLane, 1, zero_word);
  }
};

// Input values from (row, 0) on, `pixels` of them in a row, as codes [pixels][16], `spread` pixels apart.
void quantize(Block& block, int64_t row, int64_t pixels, int64_t spread, uint8_t* codes) {
  const ConvShape& s = block.call.shape;
  const ConvKernels& kernels = *block.call.kernels;
  const float* source = block.call.input + block.sample * s.sample_stride + block.channel * s.channel_stride +
                        row * s.row_stride;
  const int64_t stride = s.interleaved ? s.column_stride : s.channel_stride;
  uint32_t seen;
  if (block.call.channel_range.inverse != nullptr) {
    const auto body = s.interleaved ? kernels.quantize_channel_pixels : kernels.quantize_channel_planes;
    const ChannelRange range{block.call.channel_range.inverse + block.channel,
                             block.call.channel_range.zero_point + block.channel};
    seen = body(source, stride, block.channels, pixels, range, codes, kLane * spread);
  } else {
    const auto body = s.interleaved ? kernels.quantize_pixels : kernels.quantize_planes;
    seen = body(source, stride, block.channels, pixels, block.call.range[block.sample], codes, kLane * spread);
  }
  block.seen = std::max(block.seen, seen);
}

// Rows of padding stay as they are from one sample to the next: they are written when `fresh`.
void fill_rows(Block& block, int64_t first, int64_t count, bool fresh) {
  const ConvShape& s = block.call.shape;
  const int64_t pixels = 4 * block.layout.words;
  // None where a long stride reads nothing but the padding before them.
  const int64_t used = std::clamp<int64_t>(ceil_div(pixels - s.left, s.up_w), 0, s.width);
  const int64_t begin = std::max<int64_t>(first - s.top, 0), end = std::min(first - s.top + count, s.height);
  const bool together = narrow_planes(s) && begin < end;
  if (together) quantize(block, begin, (end - begin) * s.width, 1, block.plane);
  uint8_t* inner = block.pixels + s.left * kLane;
  for (int64_t i = 0; i < count; ++i) {
    uint8_t* words = block.words + i * pixels * kLane;
    const int64_t up_row = first + i - s.top, row = up_row / s.up_h;
    if (up_row < 0 || row >= s.height || up_row % s.up_h != 0) {
      for (int64_t word = 0; fresh && word < block.layout.words; ++word) {
        std::memcpy(words + 64 * word, block.zero_word, 64);
      }
      continue;
    }
    if (together) {
      std::memcpy(inner, block.plane + (row - begin) * s.width * kLane, static_cast<size_t>(used * kLane));
    } else {
      quantize(block, row, used, s.up_w, inner);
    }
    block.call.kernels->interleave_words(block.pixels, kLane, block.layout.words, words);
  }
}

// Output rows are collected until they are worth an epilogue.
void compute_rows(const Block& block, DepthwiseRow& row, int64_t row_begin, int64_t row_end) {
  const ConvCall& call = block.call;
  const ConvShape& s = call.shape;
  const int64_t plane = s.out_height * s.out_width, c = block.channel;
  const Epilogue epilogue{call.scale + c, call.bias ? call.bias + c : nullptr, call.zero_sum + c, 1,
                          call.input_scale[block.sample], nullptr};
  int32_t* const sums = row.sums;
  const int64_t together = epilogue_rows(s);
  for (int64_t first = row_begin; first < row_end; first += together) {
    const int64_t end = std::min(first + together, row_end);
    for (int64_t y = first; y < end; ++y) {
      row.words = block.words + (y - row_begin) * s.stride_h * block.layout.words * 64;
      // A row may write up to three outputs too many; the next row overwrites them.
      row.sums = sums + (y - first) * s.out_width * kLane;
      call.kernels->depthwise_row(row, block.layout.square, static_cast<int>(s.stride_w));
    }
    const int64_t at = first * s.out_width, pixels = (end - first) * s.out_width;
    if (s.channels_last) {
      float* to = call.output + (block.sample * plane + at) * s.channels + c;
      call.kernels->store_pixels(sums, kLane, pixels, block.channels, epilogue, to, s.channels);
    } else {
      float* to = call.output + (block.sample * s.channels + c) * plane + at;
      call.kernels->store_planes(sums, kLane, pixels, block.channels, epilogue, to, plane);
    }
  }
  row.sums = sums;
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
  scratch += (epilogue_rows(s) * s.out_width + 4) * 64;
  int8_t* weights = reinterpret_cast<int8_t*>(scratch);
  row.weights = weights;
  scratch += layout.phases * s.kernel_h * layout.span * 64;
  uint32_t seen = 0;
  const int64_t end = units * (unit_part + 1) / plan.channel_tasks;
  for (int64_t unit = units * unit_part / plan.channel_tasks; unit < end;) {
    const int64_t block_index = unit / s.batch, channel = block_index * kLane;
    Block block{call, layout, unit % s.batch, channel, std::min<int64_t>(kLane, s.channels - channel),
                scratch + row_bytes, scratch, scratch + (rows + 1) * row_bytes};
    block.write_padding();
    const int8_t* taps = call.packed + channel * s.kernel_h * s.kernel_w;
    call.kernels->depthwise_weights(taps, static_cast<int>(s.kernel_w), static_cast<int>(s.dilation_w),
                                    static_cast<int>(s.stride_w), row, weights);
    // All samples of a block follow each other: its weights and padding serve them all.
    for (bool fresh = true; unit < end && unit / s.batch == block_index; ++unit, fresh = false) {
      block.sample = unit % s.batch;
      fill_rows(block, row_begin * s.stride_h, rows, fresh);
      compute_rows(block, row, row_begin, row_end);
    }
    seen = std::max(seen, block.seen);
  }
  return seen;
}

}  // namespace narrowcast
