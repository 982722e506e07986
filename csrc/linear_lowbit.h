// Linear layers on packed weights of 2 to 8 bits in groups, activations quantized to int8. One problem description and
// one meaning for every format: a field of the packed row becomes a level, less the zero point it is a signed byte.
#pragma once

#include "kernels.h"
#include "linear.h"

namespace narrowcast {

// out[m, n] = fused(sum over blocks b, ascending, of
//   float(sum_k (codes[m, k] - 128) * (level[n, k] - zero_point[n, g(b)])) * (scale[n, g(b)] * level_scale)
//   * code_scales[m, b] + bias[n]), every float step rounded by itself; g(b) = b / blocks_per_group.
struct LowBitLinear {
  int64_t rows;               // of the whole call
  const uint8_t* codes;       // [rows, code_stride]; 128, the code of 0, behind depth
  int64_t code_stride;        // blocks * block rounded up to 64
  const float* code_scales;   // [rows, blocks]
  const int32_t* code_sums;   // [rows, blocks] what `interleaved_row` wrote; null for stored weights
  const uint8_t* weight;      // [columns, row_bytes], fields of `bits` bits as a little-endian stream; or interleaved,
                              // and then `scale` and `zero_point` are, too (see interleaved.h)
  int64_t row_bytes;
  int64_t bits;               // 2, 3, 4, 5, 6, 8; fields of 8 bits have their top bit flipped
  const uint8_t* levels;      // [16] level of each 4-bit field, or null where a field is its level
  const void* scale;          // [columns, groups] float16 or float32
  bool scale_is_half;
  float level_scale;
  const uint8_t* zero_point;  // [columns, groups], low `bits` bits, fewer than 8; or null for `zero` everywhere
  uint8_t zero;
  int64_t groups, blocks_per_group;
  int64_t block, blocks;      // 16, 32, 64, 128, or a multiple of 64 that is at least depth; their number
  int64_t depth;
  const float* bias;          // [columns] or null
  Fused fused;
  void* out;
  int64_t out_stride;
  FloatType out_type;
};

// Walks through a row of weights: which block and group comes next. Counting, since a division costs as much as
// expanding 16 columns.
struct BlockCursor {
  int64_t block_codes, group_blocks;
  int64_t codes_left = block_codes, blocks_left = group_blocks;
  int64_t block = 0, group = 0;

  void next_block() {
    ++block;
    if (--blocks_left > 0) return;
    ++group;
    blocks_left = group_blocks;
  }
  // `codes` divides every block.
  void next_codes(int64_t codes) {
    codes_left -= codes;
    if (codes_left > 0) return;
    codes_left = block_codes;
    next_block();
  }
};

struct LowBitKernels {
  // Brings the codes of one row into the order that `tile` wants; null where that is the order they have.
  void (*order_row)(const LowBitLinear& problem, uint8_t* codes);
  // Computes the given rows and columns of the output; `scratch` has scratch(problem) bytes, 64-byte aligned.
  void (*tile)(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
  int64_t (*scratch)(const LowBitLinear& problem);
};

// For interleaved weights in blocks of a multiple of 32.
struct InterleavedKernels {
  // A row of `x` as signed codes up to the end of its last chunk, the scales of its blocks, and minus the sums of its
  // blocks, times `zero` where that is the zero point; false when a value is not finite.
  bool (*row)(const LowBitLinear& problem, const void* x, FloatType type, int64_t input_group, uint8_t* codes,
              float* scales, int32_t* sums);
  void (*tile)(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
  int64_t (*scratch)(const LowBitLinear& problem);
};

void lowbit_tile_scalar(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_avx2(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_avxvnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_avxvnni_evex(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_avx512vnni(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_neondot(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_tile_neoni8mm(const LowBitLinear& problem, Range rows, Range columns, void* scratch);
void lowbit_order_row_avx512vnni(const LowBitLinear& problem, uint8_t* codes);
int64_t lowbit_scratch_scalar(const LowBitLinear& problem);
int64_t lowbit_scratch_avx2(const LowBitLinear& problem);
int64_t lowbit_scratch_avxvnni(const LowBitLinear& problem);
int64_t lowbit_scratch_avxvnni_evex(const LowBitLinear& problem);
int64_t lowbit_scratch_avx512vnni(const LowBitLinear& problem);
int64_t lowbit_scratch_neondot(const LowBitLinear& problem);
int64_t lowbit_scratch_neoni8mm(const LowBitLinear& problem);

constexpr LowBitKernels kLowBitScalar = {nullptr, lowbit_tile_scalar, lowbit_scratch_scalar};
constexpr LowBitKernels kLowBitAvx2 = {nullptr, lowbit_tile_avx2, lowbit_scratch_avx2};
constexpr LowBitKernels kLowBitAvxVnni = {nullptr, lowbit_tile_avxvnni, lowbit_scratch_avxvnni};
constexpr LowBitKernels kLowBitAvxVnniEvex = {nullptr, lowbit_tile_avxvnni_evex, lowbit_scratch_avxvnni_evex};
constexpr LowBitKernels kLowBitAvx512 = {lowbit_order_row_avx512vnni, lowbit_tile_avx512vnni,
                                         lowbit_scratch_avx512vnni};
constexpr LowBitKernels kLowBitNeonDot = {nullptr, lowbit_tile_neondot, lowbit_scratch_neondot};
constexpr LowBitKernels kLowBitNeonI8mm = {nullptr, lowbit_tile_neoni8mm, lowbit_scratch_neoni8mm};
constexpr Tiers<LowBitKernels> kLowBitTiers = {
    .scalar = &kLowBitScalar,
    .avx2 = NARROWCAST_X86_BODY(kLowBitAvx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(kLowBitAvxVnniEvex),
    .avxvnni = NARROWCAST_X86_BODY(kLowBitAvxVnni),
    .avx512vnni = NARROWCAST_X86_BODY(kLowBitAvx512),
    .neondot = NARROWCAST_ARM_BODY(kLowBitNeonDot),
    .neoni8mm = NARROWCAST_ARM_BODY(kLowBitNeonI8mm),
};

// The tiers without a table here have no body for interleaved weights: the binding brings them back into rows.
extern const InterleavedKernels lowbit_interleaved_avx2;
extern const InterleavedKernels lowbit_interleaved_avxvnni;
extern const InterleavedKernels lowbit_interleaved_avxvnni_evex;
extern const InterleavedKernels lowbit_interleaved_avx512vnni;
extern const InterleavedKernels lowbit_interleaved_neondot;

constexpr InterleavedKernels kNotInterleaved = {};
constexpr Tiers<InterleavedKernels> kLowBitInterleavedTiers = {
    .scalar = &kNotInterleaved,
    .avx2 = NARROWCAST_X86_BODY(lowbit_interleaved_avx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(lowbit_interleaved_avxvnni_evex),
    .avxvnni = NARROWCAST_X86_BODY(lowbit_interleaved_avxvnni),
    .avx512vnni = NARROWCAST_X86_BODY(lowbit_interleaved_avx512vnni),
    .neondot = NARROWCAST_ARM_BODY(lowbit_interleaved_neondot),
};

}  // namespace narrowcast
