// One convolution call: its geometry, how it is cut into independent tasks, and the body of one task. Free of torch.
#pragma once

#include <stdint.h>

#include "conv_kernels.h"

namespace narrowcast {

struct ConvShape {
  int64_t batch, channels, height, width;
  int64_t sample_stride, channel_stride, row_stride, column_stride;  // of the input, in floats
  int64_t out_channels, out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w, up_h, up_w, groups;
  bool interleaved;    // the input's channels are neighbours in memory
  bool channels_last;  // the output's channels are neighbours in memory

  int64_t group_inputs() const { return channels / groups; }
  int64_t group_outputs() const { return out_channels / groups; }
  bool depthwise() const { return groups == channels && groups == out_channels; }
};

struct ConvCall {
  ConvShape shape;
  const float* input;
  const CodeRange* range;      // [batch]
  const float* input_scale;    // [batch]
  ChannelRange channel_range;  // [channels], takes the place of `range`; or nulls
  const uint8_t* zero_row;     // dense: see write_zero_row; null where range->zero_point is that of all channels
  const int8_t* packed;
  const float* scale;
  const float* bias;
  const int32_t* zero_sum;  // [out_channels], what the zero points add to the sums
  float* output;
  const ConvKernels* kernels;
};

struct ConvPlan {
  int64_t row_tasks, channel_tasks;  // dense: over batch * out_height, over blocks of output channels;
                                     // depthwise: over out_height, over batch * blocks of 16 channels
  int64_t scratch_bytes;             // of one task
  bool parallel;

  int64_t tasks() const { return row_tasks * channel_tasks; }
};

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
constexpr int64_t padded(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Bytes of the packed weight of out_channels * inputs * kernel taps.
int64_t packed_bytes(int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups);
// Moves OIHW weights to panels (forward) or back; the panels' padding is written as zero.
void pack_weight(const int8_t* weight, int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups,
                 int8_t* packed);
void unpack_weight(const int8_t* packed, int64_t out_channels, int64_t group_inputs, int64_t taps, int64_t groups,
                   int8_t* weight);

ConvPlan plan_conv(const ConvShape& shape, const ConvKernels& kernels, int64_t threads);
// Both return the largest magnitude bits among the inputs they read.
uint32_t dense_task(const ConvCall& call, const ConvPlan& plan, int64_t task, uint8_t* scratch);
uint32_t depthwise_task(const ConvCall& call, const ConvPlan& plan, int64_t task, uint8_t* scratch);

// Sizes that the plan and the task of a dense convolution agree on.
struct DenseLayout {
  int64_t group_codes;   // bytes of one group of a pixel: its inputs rounded up to 4
  int64_t pixel_bytes;
  int64_t row_pixels;    // padded and upsampled width that the outputs read
  int64_t row_step;      // input rows from one buffered row to the next
  int64_t rows_per_output;
  int64_t row_reach;     // buffered rows one output row reads
  int64_t panels;        // of 16 output channels, per group
  int64_t panel_bytes;
};
DenseLayout dense_layout(const ConvShape& shape);
// One buffered row [row_pixels][pixel_bytes] of nothing but padding: every channel's own zero point.
void write_zero_row(const ConvShape& shape, const int32_t* zero_point, uint8_t* row);

// How depthwise outputs map to four-pixel words.
struct DepthwiseLayout {
  int phases, span, advance, first[4];
  int64_t words;  // per buffered row
  int square;     // see ConvKernels::depthwise_row
};
DepthwiseLayout depthwise_layout(const ConvShape& shape);
// Output rows per epilogue: a transpose of 16 x 16 values wants 16 pixels.
int64_t epilogue_rows(const ConvShape& shape);

// Planar rows so short that vectors would be half empty: their plane is quantized in one run, then cut into rows.
bool narrow_planes(const ConvShape& shape);

}  // namespace narrowcast
