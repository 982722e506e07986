// The torch-free kernels of integer networks beside those of conv_kernels.h: one table per instruction set. The float
// steps are written without fused multiply-add, in the order that narrowcast.kernels.network gives.
#pragma once

#include "conv_kernels.h"

namespace narrowcast {

enum class Activation : int { none = 0, hard_swish = 1, relu = 2, relu6 = 3 };

// How a sum ends: the activation, the float copy, codes, the clamp. Per-channel constants, null where there are none.
struct FinishTail {
  const float* low;
  const float* high;
  const float* inverse;  // null: neither activation nor float copy
  const float* zero;
  Activation activation;
  bool target_coded;
};

struct FinishTerms {
  const float* multiplier;
  const float* offset;
  const float* second_multiplier;  // null: no second source
  bool second_coded;
  FinishTail tail;
};

// Neighbouring pixels of one row: where they are written, what is added, where their float copy goes.
struct PixelRun {
  int64_t pixels;
  uint8_t* target;
  const uint8_t* second;
  uint8_t* floats;  // null: no copy
};

// Sums [pixels][sums_stride] of all runs, one after the other, to `channels` channels of their pixels. Steps are bytes
// from pixel to pixel; offsets are bytes from a pixel to the first of the channels.
struct FinishBlock {
  const int32_t* sums;
  int64_t sums_stride;
  int64_t channels;
  const PixelRun* runs;
  int64_t run_count;
  int64_t target_step, second_step, floats_step;
  int64_t target_offset, second_offset, floats_offset;
};

// The part of a pool's window that is inside the image.
struct PoolWindow {
  const uint8_t* data;
  int64_t rows, columns, row_step, column_step;  // steps in bytes
};

struct AverageTerms {
  const float* multiplier;
  const float* offset;
  const float* low;
  const float* high;
  const float* outside;    // zero points of what lies outside the image; null: it is 0
  float outside_count;
  float inverse_count;
  bool source_coded, target_coded;
};

// Neighbouring pixels of an ADD.
struct AddRow {
  const uint8_t* source;
  const uint8_t* second;
  uint8_t* target;
  uint8_t* floats;                                              // of the float copy, or null
  int64_t source_step, second_step, target_step, floats_step;  // bytes from pixel to pixel
  int64_t pixels, channels;
  const float* multiplier;
  const float* second_multiplier;
  const float* offset;
  bool source_coded, second_coded;
};

struct NetworkKernels {
  void (*finish)(const FinishBlock& block, const FinishTerms& terms);
  void (*max_codes)(const PoolWindow& window, int64_t channels, uint8_t* target);
  void (*max_floats)(const PoolWindow& window, int64_t channels, float* target);
  void (*average)(const PoolWindow& window, int64_t channels, const AverageTerms& terms, uint8_t* target);
  void (*add)(const AddRow& row, const FinishTail& tail);
  // y = (float(code) - zero) * scale
  void (*dequantize)(const uint8_t* source, int64_t source_step, float* target, int64_t target_step, int64_t pixels,
                     int64_t channels, const float* scale, const float* zero);
  // One row of 16 channels (see ConvKernels::depthwise_row) straight to codes `step` bytes apart; false where only sums
  // and `finish` can do it.
  bool (*depthwise_codes)(const DepthwiseRow& row, int square, int stride, const FinishTerms& terms, uint8_t* target,
                          int64_t step);
};

extern const NetworkKernels network_scalar;
extern const NetworkKernels network_avx2;
extern const NetworkKernels network_avxvnni_evex;
extern const NetworkKernels network_avxvnni;
extern const NetworkKernels network_avx512vnni;
extern const NetworkKernels network_neondot;
extern const NetworkKernels network_neoni8mm;

constexpr Tiers<NetworkKernels> kNetworkTiers = {
    .scalar = &network_scalar,
    .avx2 = NARROWCAST_X86_BODY(network_avx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(network_avxvnni_evex),
    .avxvnni = NARROWCAST_X86_BODY(network_avxvnni),
    .avx512vnni = NARROWCAST_X86_BODY(network_avx512vnni),
    .neondot = NARROWCAST_ARM_BODY(network_neondot),
    .neoni8mm = NARROWCAST_ARM_BODY(network_neoni8mm),
};

}  // namespace narrowcast
