// The torch-free kernels of integer networks beside those of conv_kernels.h: one table per instruction set. The float
// steps are written without fused multiply-add, in the order that narrowcast.kernels.network gives.
#pragma once

#include "conv_kernels.h"

namespace narrowcast {

constexpr int64_t kHardSwish = 1;

// Per-channel constants of the epilogue; null where the step has none.
struct FinishTerms {
  const float* multiplier;
  const float* offset;
  const float* low;
  const float* high;
  const float* second_multiplier;  // null: no second source
  const float* inverse;            // null: no activation
  const float* zero;
  bool second_coded, target_coded;
};

// Sums [pixels][sums_stride] to `channels` channels of the pixels at `target`; `second` likewise.
struct FinishBlock {
  const int32_t* sums;
  int64_t sums_stride;
  int64_t pixels;
  int64_t channels;
  uint8_t* const* target;
  const uint8_t* const* second;
  int64_t target_offset, second_offset;  // bytes, added to the addresses
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

// Neighbouring pixels of an ADD: `low`, `high` and so on as in StepKind.ADD.
struct AddRow {
  const uint8_t* source;
  const uint8_t* second;
  uint8_t* target;
  int64_t source_step, second_step, target_step;  // bytes from pixel to pixel
  int64_t pixels, channels;
  const float* constants;  // [5][channels]
  bool source_coded, second_coded, target_coded;
};

struct NetworkKernels {
  void (*finish)(const FinishBlock& block, const FinishTerms& terms);
  void (*max_codes)(const PoolWindow& window, int64_t channels, uint8_t* target);
  void (*max_floats)(const PoolWindow& window, int64_t channels, float* target);
  void (*average)(const PoolWindow& window, int64_t channels, const AverageTerms& terms, uint8_t* target);
  void (*add)(const AddRow& row);
  // y = (float(code) - zero) * scale
  void (*dequantize)(const uint8_t* source, int64_t source_step, float* target, int64_t target_step, int64_t pixels,
                     int64_t channels, const float* scale, const float* zero);
};

extern const NetworkKernels network_scalar;
extern const NetworkKernels network_avx2;
extern const NetworkKernels network_avx512vnni;

constexpr Tiers<NetworkKernels> kNetworkTiers = {
    .scalar = &network_scalar,
    .avx2 = NARROWCAST_X86_BODY(network_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(network_avx512vnni),
};

}  // namespace narrowcast
