// The torch-free kernels of convolution: one table of function pointers per instruction set. Integers are identical
// on every tier; the float steps are written without fused multiply-add, so the floats are identical too.
#pragma once

#include "kernels.h"

namespace narrowcast {

constexpr int kLane = 16;  // output channels of one weight panel

// How a float becomes a u8 code: round_half_even(clamp(x * inverse, low, high)) + zero_point.
struct CodeRange {
  float inverse;
  float low;
  float high;
  int32_t zero_point;
};

// The same with one inverse and one zero point per channel; null: one CodeRange for all.
struct ChannelRange {
  const float* inverse;
  const int32_t* zero_point;
};

// Rows of u8 activations against `vectors` (1, 2 or 4) panels of 16 output channels. Row p reads 4 * steps bytes at
// row[p] + tap_offset[t] for every tap t. A panel is [taps][steps][16][4] int8; sums are [rows][vectors * 16].
struct DotBlock {
  const uint8_t* const* row;
  int64_t rows;
  const int64_t* tap_offset;
  int64_t taps;
  int64_t steps;
  const int8_t* panel;
  int64_t panel_stride;
  int vectors;
  int32_t* sums;
};

// Per output channel: y = float(sum - offset_factor * offset) * (input_scale * scale) + bias.
struct Epilogue {
  const float* scale;
  const float* bias;  // may be null
  const int32_t* offset;
  int32_t offset_factor;
  float input_scale;
  const float* row_scale;  // of every pixel in place of input_scale (store_pixels only); may be null
};

// One row of depthwise outputs for 16 channels. A word holds one channel at four neighbouring x positions; `words`
// is [kernel_rows at row_stride][width4][16][4]. An output reads `span` words per kernel row from word
// `first[phase]` of its repeat; `weights` is [phases][kernel_rows][span][16][4], shifted to the phase's bytes.
struct DepthwiseRow {
  const uint8_t* words;
  int64_t row_stride;
  const int8_t* weights;
  int kernel_rows;
  int phases;  // outputs per repeat of the byte alignment: 1, 2 or 4
  int span;
  int first[4];
  int advance;    // words from one repeat to the next
  int64_t width;  // outputs
  int32_t* sums;  // [width rounded up to phases][16]
};

struct ConvKernels {
  // The largest bit pattern of |x|: 0x7f800000 or more when a value is not finite.
  uint32_t (*magnitude_bits)(const float* values, int64_t count, uint32_t seed);
  // Channel-planar floats to interleaved codes (channels rounded up to four are written); returns 0x7f800000 or more when a value is not finite.
  uint32_t (*quantize_planes)(const float* source, int64_t plane_stride, int64_t channels, int64_t width,
                              CodeRange range, uint8_t* codes, int64_t pixel_stride);
  // Channel-interleaved floats to interleaved codes; returns 0x7f800000 or more when a value is not finite.
  uint32_t (*quantize_pixels)(const float* source, int64_t source_stride, int64_t channels, int64_t width,
                              CodeRange range, uint8_t* codes, int64_t pixel_stride);
  // Both with the range of every channel, `range` pointing at the first one.
  uint32_t (*quantize_channel_planes)(const float* source, int64_t plane_stride, int64_t channels, int64_t width,
                                      ChannelRange range, uint8_t* codes, int64_t pixel_stride);
  uint32_t (*quantize_channel_pixels)(const float* source, int64_t source_stride, int64_t channels, int64_t width,
                                      ChannelRange range, uint8_t* codes, int64_t pixel_stride);
  // [words * 4 pixels][16 channels] bytes to [words][16][4].
  void (*interleave_words)(const uint8_t* pixels, int64_t pixel_stride, int64_t words, uint8_t* output);
  int64_t tile_rows;  // rows of the largest register tile
  int tile_vectors;   // panels beside it
  void (*dot_block)(const DotBlock& block);
  // Spreads taps [kernel_rows * kernel_columns][16] int8 over the byte positions of every phase.
  void (*depthwise_weights)(const int8_t* taps, int kernel_columns, int dilation, int stride, const DepthwiseRow& row,
                            int8_t* weights);
  // `square`: the kernel size when it is square, undilated and `stride` is 1 or 2; else 0.
  void (*depthwise_row)(const DepthwiseRow& row, int square, int stride);
  // Epilogue of [pixels][sums_stride] sums to channels-last (pixel_stride) or planar (plane_stride) output.
  void (*store_pixels)(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t channels,
                       const Epilogue& epilogue, float* output, int64_t pixel_stride);
  void (*store_planes)(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t channels,
                       const Epilogue& epilogue, float* output, int64_t plane_stride);
};

extern const ConvKernels conv_scalar;
extern const ConvKernels conv_avx2;
extern const ConvKernels conv_avxvnni_evex;
extern const ConvKernels conv_avxvnni;
extern const ConvKernels conv_avx512vnni;
extern const ConvKernels conv_neondot;
extern const ConvKernels conv_neoni8mm;

constexpr Tiers<ConvKernels> kConvTiers = {
    .scalar = &conv_scalar,
    .avx2 = NARROWCAST_X86_BODY(conv_avx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(conv_avxvnni_evex),
    .avxvnni = NARROWCAST_X86_BODY(conv_avxvnni),
    .avx512vnni = NARROWCAST_X86_BODY(conv_avx512vnni),
    .neondot = NARROWCAST_ARM_BODY(conv_neondot),
    .neoni8mm = NARROWCAST_ARM_BODY(conv_neoni8mm),
};

}  // namespace narrowcast
