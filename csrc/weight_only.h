// Linear layers on float activations: weights are expanded as they are used, products and sums are float32.
#pragma once

#include "stored_weight.h"

namespace narrowcast {

// Depth of one panel in bytes: six rows of a panel and four of the input are close to what a first-level cache holds.
constexpr int64_t kPanelBytes = 4096;
constexpr int64_t kPanelColumns = 48;  // a multiple of every tier's register tile
constexpr int64_t kPanelRows = 192;
// A row of a panel is this much longer than its depth: rows at a distance of 4096 bytes would share cache sets.
constexpr int64_t kPanelPad = 64;

struct WeightOnlyKernels {
  // Whether `few_rows` covers a weight: its groups are made of whole lanes.
  bool (*covers)(const StoredWeight& weight);

  // Floats that `arrange` writes for one row of the input.
  int64_t (*arranged)(const StoredWeight& weight, int parts);

  // One input row in the order in which `few_rows` meets the codes. `parts` is how many bfloat16 numbers add up to an
  // input, 1 or 2, where the kernel multiplies those.
  void (*arrange)(const StoredWeight& weight, const float* x, int parts, float* out);

  // sums[m * (end - begin) + n] for `rows` input rows and the weight's rows begin .. end - 1; x holds the arranged rows.
  void (*few_rows)(const StoredWeight& weight, const float* x, int parts, int64_t rows, int64_t begin, int64_t end,
                   float* sums);

  // sums[m * kPanelColumns + n] += x row m . panel row n over `depth` bytes of elements, a multiple of 64; panel rows
  // up to the next multiple of the register tile are read, and sums are written for them.
  void (*dot_panel)(const void* x, int64_t rows, const void* panel, int64_t columns, int64_t depth, float* sums);

  // One row of a panel from `count` expanded floats, zeros up to `depth` bytes; null where panels hold floats.
  void (*to_panel)(const float* values, int64_t count, int64_t depth, void* panel);
};

extern const WeightOnlyKernels weight_only_scalar;
extern const WeightOnlyKernels weight_only_avx2;
extern const WeightOnlyKernels weight_only_avx512vnni;
extern const WeightOnlyKernels weight_only_avx512bf16;  // the same on bfloat16 panels and inputs

constexpr Tiers<WeightOnlyKernels> kWeightOnlyTiers = {
    .scalar = &weight_only_scalar,
    .avx2 = NARROWCAST_X86_BODY(weight_only_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(weight_only_avx512vnni),
};

}  // namespace narrowcast
