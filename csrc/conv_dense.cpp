// One task of a dense (or grouped) convolution: quantize the input rows it needs into a padded channels-last buffer,
// then multiply register tiles of pixels with weight panels, whatever rows or samples the pixels come from.
#include "conv_plan.h"

#include <algorithm>
#include <cstring>

namespace narrowcast {
namespace {

constexpr int64_t kBlockPixels = 48;  // sums kept between dot products and epilogue: 4 tiles

struct Task {
  const ConvCall& call;
  const DenseLayout layout;
  int64_t row_begin, row_end;  // of batch * out_height
  uint8_t* codes;
  const uint8_t** pixel;
  int64_t* tap_offset;
  int32_t* sums;
  uint8_t* plane;  // rows of a narrow planar input without padding
  uint32_t seen = 0;

  int64_t row_bytes() const { return layout.row_pixels * layout.pixel_bytes; }
};

// `pixels` input values per channel from (row, 0) on.
void quantize(Task& task, int64_t sample, int64_t row, int64_t pixels, uint8_t* codes) {
  const ConvShape& s = task.call.shape;
  const DenseLayout& layout = task.layout;
  const ConvKernels& kernels = *task.call.kernels;
  const CodeRange range = task.call.range[sample];
  const bool per_channel = task.call.channel_range.inverse != nullptr;
  const float* source = task.call.input + sample * s.sample_stride + row * s.row_stride;
  const int64_t pixel_stride = layout.pixel_bytes * s.up_w;
  const bool gapless = layout.group_codes == s.group_inputs();
  const int64_t parts = gapless ? 1 : s.groups, inputs = s.channels / parts;
  for (int64_t part = 0; part < parts; ++part, codes += layout.group_codes) {
    const float* from = source + part * inputs * s.channel_stride;
    uint32_t seen = 0;
    if (per_channel) {
      const auto body = s.interleaved ? kernels.quantize_channel_pixels : kernels.quantize_channel_planes;
      const int64_t stride = s.interleaved ? s.column_stride : s.channel_stride, first = part * inputs;
      const ChannelRange channels{task.call.channel_range.inverse + first, task.call.channel_range.zero_point + first};
      seen = body(from, stride, inputs, pixels, channels, codes, pixel_stride);
    } else if (!s.interleaved) {
      seen = kernels.quantize_planes(from, s.channel_stride, inputs, pixels, range, codes, pixel_stride);
    } else if (s.column_stride == s.channels && pixel_stride == s.channels && gapless) {
      seen = kernels.quantize_pixels(from, 0, pixels * s.channels, 1, range, codes, 0);
    } else {
      seen = kernels.quantize_pixels(from, s.column_stride, inputs, pixels, range, codes, pixel_stride);
    }
    task.seen = std::max(task.seen, seen);
  }
}

void write_padding(const Task& task, int64_t sample, uint8_t* row) {
  const auto bytes = static_cast<size_t>(task.row_bytes());
  if (task.call.zero_row == nullptr) {
    std::memset(row, task.call.range[sample].zero_point, bytes);
  } else {
    std::memcpy(row, task.call.zero_row, bytes);
  }
}

// Buffer rows of one sample, from padded row `first`; returns the end of what it wrote.
uint8_t* fill_segment(Task& task, int64_t sample, int64_t first, int64_t count, uint8_t* codes) {
  const ConvShape& s = task.call.shape;
  const DenseLayout& layout = task.layout;
  const int64_t bytes = task.row_bytes();
  const bool plain = s.left == 0 && layout.row_pixels == s.width && s.up_h == 1 && s.up_w == 1 && layout.row_step == 1;
  const bool gapless = plain && s.row_stride == s.width * s.column_stride;
  const bool padded_row = s.up_w > 1 || s.left > 0 || s.left + s.width < layout.row_pixels;
  const int64_t begin = std::max<int64_t>(first - s.top, 0), end = std::min(first - s.top + count, s.height);
  const bool together = !gapless && layout.row_step == 1 && narrow_planes(s) && begin < end;
  if (together) quantize(task, sample, begin, (end - begin) * s.width, task.plane);
  // None where a long stride reads nothing but the padding before them.
  const int64_t used = std::clamp<int64_t>(ceil_div(layout.row_pixels - s.left, s.up_w), 0, s.width);
  for (int64_t i = 0; i < count;) {
    uint8_t* to = codes + i * bytes;
    const int64_t up_row = first + i * layout.row_step - s.top, row = up_row / s.up_h;
    if (up_row < 0 || row >= s.height || up_row % s.up_h != 0) {
      write_padding(task, sample, to);
      ++i;
      continue;
    }
    if (padded_row) write_padding(task, sample, to);
    const int64_t rows = gapless ? std::min(count - i, s.height - row) : 1;
    to += s.left * layout.pixel_bytes;
    if (together) {
      const uint8_t* from = task.plane + (row - begin) * s.width * layout.pixel_bytes;
      std::memcpy(to, from, static_cast<size_t>(used * layout.pixel_bytes));
    } else {
      quantize(task, sample, row, used * rows, to);
    }
    i += rows;
  }
  return codes + count * bytes;
}

// Fills the buffer and the address of every output pixel's first tap.
void fill_codes(Task& task) {
  const ConvShape& s = task.call.shape;
  const DenseLayout& layout = task.layout;
  uint8_t* codes = task.codes;
  const uint8_t** pixel = task.pixel;
  for (int64_t row = task.row_begin; row < task.row_end;) {
    const int64_t sample = row / s.out_height, begin = row % s.out_height;
    const int64_t rows = std::min(task.row_end - row, s.out_height - begin);
    const int64_t count = (rows - 1) * layout.rows_per_output + layout.row_reach;
    const uint8_t* segment = codes;
    codes = fill_segment(task, sample, begin * s.stride_h, count, codes);
    for (int64_t y = 0; y < rows; ++y) {
      const uint8_t* at = segment + y * layout.rows_per_output * task.row_bytes();
      for (int64_t x = 0; x < s.out_width; ++x, at += s.stride_w * layout.pixel_bytes) *pixel++ = at;
    }
    row += rows;
  }
}

// Writes `count` pixels from `pixel` (counted within the task) of `channels` outputs from `channel`.
void store_block(const Task& task, int64_t pixel, int64_t count, int64_t channel, int64_t channels, int64_t stride) {
  const ConvCall& call = task.call;
  const ConvShape& s = call.shape;
  const int64_t plane = s.out_height * s.out_width, begin = task.row_begin * s.out_width + pixel;
  Epilogue epilogue{call.scale + channel, call.bias ? call.bias + channel : nullptr, call.zero_sum + channel, 1, 0,
                    nullptr};
  for (int64_t done = 0; done < count;) {
    const int64_t at = begin + done, sample = at / plane, run = std::min(count - done, plane - at % plane);
    epilogue.input_scale = call.input_scale[sample];
    const int32_t* sums = task.sums + done * stride;
    if (s.channels_last || plane == 1) {
      float* to = call.output + at * s.out_channels + channel;
      call.kernels->store_pixels(sums, stride, run, channels, epilogue, to, s.out_channels);
    } else {
      float* to = call.output + (sample * s.out_channels + channel) * plane + at % plane;
      call.kernels->store_planes(sums, stride, run, channels, epilogue, to, plane);
    }
    done += run;
  }
}

// Taps that follow each other in the buffer are one long tap.
void set_taps(Task& task, int64_t group, DotBlock& block) {
  const ConvShape& s = task.call.shape;
  const DenseLayout& layout = task.layout;
  const bool merge = s.dilation_w == 1 && s.groups == 1;
  block.steps = layout.group_codes / 4 * (merge ? s.kernel_w : 1);
  block.taps = 0;
  for (int64_t y = 0; y < s.kernel_h; ++y) {
    for (int64_t x = 0; x < (merge ? 1 : s.kernel_w); ++x) {
      const int64_t pixels = y * s.dilation_h * layout.row_pixels + x * s.dilation_w;
      task.tap_offset[block.taps++] = pixels * layout.pixel_bytes + group * layout.group_codes;
    }
  }
  block.tap_offset = task.tap_offset;
}

void multiply(Task& task, int64_t first_block, int64_t end_block, int64_t block_panels) {
  const ConvCall& call = task.call;
  const DenseLayout& layout = task.layout;
  const int64_t outputs = call.shape.group_outputs(), blocks = ceil_div(layout.panels, block_panels);
  const int64_t pixels = (task.row_end - task.row_begin) * call.shape.out_width;
  const int64_t parts = ceil_div(pixels, kBlockPixels);
  for (int64_t index = first_block; index < end_block; ++index) {
    const int64_t group = index / blocks, panel_begin = index % blocks * block_panels;
    const int64_t panel_end = std::min(panel_begin + block_panels, layout.panels);
    DotBlock block{};
    set_taps(task, group, block);
    block.panel_stride = layout.panel_bytes;
    block.sums = task.sums;
    for (int64_t panel = panel_begin; panel < panel_end; panel += block.vectors) {
      const int64_t left = panel_end - panel, channel = panel * kLane;
      block.vectors = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      block.panel = call.packed + (group * layout.panels + panel) * layout.panel_bytes;
      const int64_t channels = std::min(block.vectors * int64_t{kLane}, outputs - channel);
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t begin = pixels * part / parts;
        block.row = task.pixel + begin;
        block.rows = pixels * (part + 1) / parts - begin;
        call.kernels->dot_block(block);
        store_block(task, begin, block.rows, group * outputs + channel, channels, block.vectors * kLane);
      }
    }
  }
}

}  // namespace

uint32_t dense_task(const ConvCall& call, const ConvPlan& plan, int64_t index, uint8_t* scratch) {
  const ConvShape& s = call.shape;
  const int64_t rows = s.batch * s.out_height;
  const int64_t part = index / plan.channel_tasks, channel_part = index % plan.channel_tasks;
  Task task{call, dense_layout(s), rows * part / plan.row_tasks, rows * (part + 1) / plan.row_tasks,
            nullptr, nullptr, nullptr, nullptr, nullptr};
  const int64_t task_pixels = ceil_div(rows, plan.row_tasks) * s.out_width;
  task.sums = reinterpret_cast<int32_t*>(scratch);
  scratch += kBlockPixels * 64 * 4;
  task.pixel = reinterpret_cast<const uint8_t**>(scratch);
  scratch += padded(8 * task_pixels, 64);
  task.tap_offset = reinterpret_cast<int64_t*>(scratch);
  scratch += padded(8 * s.kernel_h * s.kernel_w, 64);
  task.plane = scratch;
  task.codes = scratch + (narrow_planes(s) ? padded(s.height * s.width * task.layout.pixel_bytes, 64) : 0);
  fill_codes(task);
  const int64_t widest = call.kernels->tile_vectors, pixels = (task.row_end - task.row_begin) * s.out_width;
  const int64_t block_panels = widest < 2 ? 1 : pixels <= call.kernels->tile_rows / 2 ? widest : 2;
  const int64_t blocks = s.groups * ceil_div(task.layout.panels, block_panels);
  multiply(task, blocks * channel_part / plan.channel_tasks, blocks * (channel_part + 1) / plan.channel_tasks,
           block_panels);
  return task.seen;
}

}  // namespace narrowcast
