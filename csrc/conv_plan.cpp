// Geometry of a convolution call: weight panels, buffer sizes, and how the work is cut.
#include "conv_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>

namespace narrowcast {
namespace {

constexpr int64_t kCacheBytes = 192 * 1024;  // codes of one task; leaves room for weights in a 512 KiB L2
constexpr double kSerialNanoseconds = 8000.0;

// Calls visit(weight index, packed index) for every weight.
template <class Visit>
void each_weight(int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups, const Visit& visit) {
  const int64_t outputs = out_channels / groups;
  const bool depthwise = group_inputs == 1 && outputs == 1;
  const int64_t steps = ceil_div(group_inputs, 4), panels = ceil_div(outputs, kLane);
  for (int64_t o = 0; o < out_channels; ++o) {
    const int64_t panel = o / outputs * panels + o % outputs / kLane, lane = o % outputs % kLane;
    for (int64_t i = 0; i < group_inputs; ++i) {
      for (int64_t t = 0; t < taps; ++t) {
        const int64_t to = depthwise ? (o / kLane * taps + t) * kLane + o % kLane
                                     : ((panel * taps + t) * steps + i / 4) * 4 * kLane + lane * 4 + i % 4;
        visit((o * group_inputs + i) * taps + t, to);
      }
    }
  }
}

double estimate_nanoseconds(const ConvShape& s) {
  const double outputs = static_cast<double>(s.batch * s.out_channels * s.out_height * s.out_width);
  const double inputs = static_cast<double>(s.batch * s.channels * s.height * s.width);
  const double taps = static_cast<double>(s.kernel_h * s.kernel_w * std::max<int64_t>(s.group_inputs(), 4));
  return outputs * taps / 150.0 + 0.15 * inputs + 0.15 * outputs;
}

int64_t narrow_bytes(const ConvShape& s, int64_t rows, int64_t pixel_bytes) {
  return narrow_planes(s) ? std::min(rows, s.batch * s.height) * s.width * pixel_bytes : 0;
}

ConvPlan plan_dense(const ConvShape& s, const ConvKernels& kernels, int64_t threads) {
  const DenseLayout layout = dense_layout(s);
  const int64_t rows = s.batch * s.out_height, pixels = rows * s.out_width;
  const double cost = estimate_nanoseconds(s);
  const int64_t wanted = cost < kSerialNanoseconds ? 1 : cost < 200000.0 ? threads : 4 * threads;
  const int64_t row_bytes = layout.row_pixels * layout.pixel_bytes * layout.rows_per_output;
  ConvPlan plan{};
  const int64_t blocks = s.groups * ceil_div(layout.panels, 2);
  const bool split_channels = pixels < 2 * kernels.tile_rows * threads && blocks >= threads;
  plan.row_tasks = std::max(ceil_div(rows * row_bytes, kCacheBytes), split_channels ? 1 : wanted);
  plan.row_tasks = std::min(plan.row_tasks, rows);
  plan.channel_tasks = split_channels ? std::min(blocks, wanted) : 1;
  plan.parallel = cost >= kSerialNanoseconds;
  const int64_t task_rows = ceil_div(rows, plan.row_tasks);
  const int64_t segments = task_rows / std::max<int64_t>(s.out_height, 1) + 2;
  const int64_t buffered = task_rows * layout.rows_per_output + segments * layout.row_reach;
  plan.scratch_bytes = padded(buffered * layout.row_pixels * layout.pixel_bytes, 64) +
                       padded(8 * task_rows * s.out_width, 64) + padded(8 * s.kernel_h * s.kernel_w, 64) +
                       48 * 64 * 4 + padded(narrow_bytes(s, s.height, layout.pixel_bytes), 64) + 256;
  return plan;
}

ConvPlan plan_depthwise(const ConvShape& s, int64_t threads) {
  const DepthwiseLayout layout = depthwise_layout(s);
  const int64_t units = s.batch * ceil_div(s.channels, kLane);
  const int64_t reach = (s.kernel_h - 1) * s.dilation_h + 1;
  const double cost = estimate_nanoseconds(s) / 4.0;  // four taps at once
  const int64_t wanted = cost < kSerialNanoseconds ? 1 : cost < 200000.0 ? threads : 4 * threads;
  ConvPlan plan{};
  plan.parallel = cost >= kSerialNanoseconds;
  plan.channel_tasks = std::min(units, wanted);
  const int64_t bytes = layout.words * 64 * s.stride_h * s.out_height;
  plan.row_tasks = std::max(ceil_div(bytes, kCacheBytes), ceil_div(wanted, std::max<int64_t>(units, 1)));
  plan.row_tasks = std::min(plan.row_tasks, s.out_height);
  const int64_t rows = (ceil_div(s.out_height, plan.row_tasks) - 1) * s.stride_h + reach;
  plan.scratch_bytes = (rows + 1) * layout.words * 64 + layout.phases * s.kernel_h * layout.span * 64 +
                       (epilogue_rows(s) * s.out_width + 4) * 64 + narrow_bytes(s, rows, kLane) + 256;
  return plan;
}

}  // namespace

int64_t packed_bytes(int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups) {
  const int64_t outputs = out_channels / groups;
  if (group_inputs == 1 && outputs == 1) return padded(out_channels, kLane) * taps;
  return groups * padded(outputs, kLane) * taps * padded(group_inputs, 4);
}

void pack_weight(const int8_t* weight, int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups,
                 int8_t* packed) {
  std::memset(packed, 0, static_cast<size_t>(packed_bytes(out_channels, group_inputs, taps, groups)));
  each_weight(out_channels, group_inputs, taps, groups, [&](int64_t from, int64_t to) { packed[to] = weight[from]; });
}

void unpack_weight(const int8_t* packed, int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups,
                   int8_t* weight) {
  each_weight(out_channels, group_inputs, taps, groups, [&](int64_t to, int64_t from) { weight[to] = packed[from]; });
}

DenseLayout dense_layout(const ConvShape& s) {
  DenseLayout layout{};
  layout.group_codes = padded(s.group_inputs(), 4);
  layout.pixel_bytes = layout.group_codes * s.groups;
  layout.row_pixels = (s.out_width - 1) * s.stride_w + (s.kernel_w - 1) * s.dilation_w + 1;
  layout.row_step = s.kernel_h == 1 ? s.stride_h : 1;
  layout.rows_per_output = s.kernel_h == 1 ? 1 : s.stride_h;
  layout.row_reach = (s.kernel_h - 1) * s.dilation_h + 1;
  layout.panels = ceil_div(s.group_outputs(), kLane);
  layout.panel_bytes = kLane * s.kernel_h * s.kernel_w * layout.group_codes;
  return layout;
}

void write_zero_row(const ConvShape& s, const int32_t* zero_point, uint8_t* row) {
  const DenseLayout layout = dense_layout(s);
  const int64_t inputs = s.group_inputs(), bytes = layout.row_pixels * layout.pixel_bytes;
  for (int64_t group = 0; group < s.groups; ++group) {
    for (int64_t c = 0; c < layout.group_codes; ++c) {
      row[group * layout.group_codes + c] = static_cast<uint8_t>(c < inputs ? zero_point[group * inputs + c] : 0);
    }
  }
  for (int64_t done = layout.pixel_bytes; done < bytes; done *= 2) {
    std::memcpy(row + done, row, static_cast<size_t>(std::min(done, bytes - done)));
  }
}

DepthwiseLayout depthwise_layout(const ConvShape& s) {
  DepthwiseLayout layout{};
  const int64_t common = std::gcd<int64_t>(4, s.stride_w);
  layout.phases = static_cast<int>(4 / common);
  layout.advance = static_cast<int>(s.stride_w / common);
  const int64_t reach = (s.kernel_w - 1) * s.dilation_w;
  for (int phase = 0; phase < layout.phases; ++phase) {
    const int64_t position = phase * s.stride_w;
    layout.first[phase] = static_cast<int>(position / 4);
    layout.span = std::max(layout.span, static_cast<int>((position % 4 + reach) / 4 + 1));
  }
  const bool plain = s.kernel_h == s.kernel_w && s.dilation_w == 1 && s.stride_w <= 2;
  layout.square = plain && (s.kernel_h == 3 || s.kernel_h == 5) ? static_cast<int>(s.kernel_h) : 0;
  const int64_t repeats = ceil_div(s.out_width, layout.phases);
  layout.words = (repeats - 1) * layout.advance + layout.first[layout.phases - 1] + layout.span;
  return layout;
}

int64_t epilogue_rows(const ConvShape& s) { return std::max<int64_t>(1, 64 / s.out_width); }

bool narrow_planes(const ConvShape& s) {
  return !s.interleaved && s.up_h == 1 && s.up_w == 1 && s.width % 16 != 0 && s.width < 64;
}

ConvPlan plan_conv(const ConvShape& shape, const ConvKernels& kernels, int64_t threads) {
  return shape.depthwise() ? plan_depthwise(shape, threads) : plan_dense(shape, kernels, threads);
}

}  // namespace narrowcast
