// Linear layers on quantized activations. Weights are read in their stored row-major layout; a kernel that wants
// another order copies a tile of columns into the caller's scratch, never the whole matrix.
#pragma once

#include "kernels.h"

namespace narrowcast {

// out[m, n] = float(sum_k codes[m, k] * weight[n, k] - row_offset[m] * offset[n]) * (row_scale[m] * scale[n]) + bias[n]
struct Int8Linear {
  const uint8_t* codes;       // [rows, code_stride], uint8
  int64_t code_stride;        // a multiple of 64, >= depth; what lies behind `depth` does not matter
  const float* row_scale;     // [rows]
  const int32_t* row_offset;  // [rows] the zero point where a row has one, 1 where `offset` holds it
  const int8_t* weight;       // [columns, depth]
  const float* scale;         // [columns]
  const int32_t* offset;      // [columns] what zero points add to the sums, divided by row_offset
  const float* bias;          // [columns] or null
  int64_t depth;
  void* out;                  // [rows, out_stride]
  int64_t out_stride;         // in elements
  FloatType out_type;
};

// out[m, n] = sum over blocks b of 32 inputs, ascending, of
//   float(sum_k codes[m, k] * nibble[n, k] - zero_point[n, g(b)] * code_sums[m, b]) * (code_scales[m, b] * scale[n, g(b)])
// + bias[n], where g(b) = b / blocks_per_group.
struct Int4Linear {
  const int8_t* codes;        // [rows, code_stride] per block: 16 even elements, then 16 odd ones; zeros behind depth
  int64_t code_stride;        // a multiple of 128, >= depth; zeros behind the last block
  const float* code_scales;   // [rows, block_stride], zeros behind the last block
  const int32_t* code_sums;   // [rows, block_stride], zeros behind the last block
  int64_t block_stride;       // code_stride / 32
  const uint8_t* weight;      // [columns, ceil(depth / 2)], first element in the low nibble
  const uint16_t* scale;      // [columns, groups] float16
  const uint8_t* zero_point;  // [columns, groups] or null for 8
  int64_t groups;
  int64_t blocks_per_group;
  const float* bias;          // [columns] or null
  int64_t depth;
  void* out;
  int64_t out_stride;
  FloatType out_type;
};

struct Range {
  int64_t begin, end;
};

struct LinearKernels {
  // Computes the given rows and columns of the output; `scratch` has *_scratch(depth) bytes, 64-byte aligned.
  void (*int8_tile)(const Int8Linear& problem, Range rows, Range columns, void* scratch);
  void (*int4_tile)(const Int4Linear& problem, Range rows, Range columns, void* scratch);
  int64_t (*int8_scratch)(int64_t depth);
  int64_t (*int4_scratch)(int64_t depth);
};

// Columns per task: a multiple of every tier's register tile, so that a task boundary never splits one.
constexpr int64_t kColumnTile = 64;

// The tile kernels, one file per element type and tier.
void int8_tile_scalar(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avx2(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avxvnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avxvnni_evex(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avx512vnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_scalar(const Int4Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_avx2(const Int4Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_avxvnni(const Int4Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_avxvnni_evex(const Int4Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_avx512vnni(const Int4Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_neondot(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_neoni8mm(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int4_tile_neondot(const Int4Linear& problem, Range rows, Range columns, void* scratch);
int64_t int8_scratch_scalar(int64_t depth);
int64_t int8_scratch_avx2(int64_t depth);
int64_t int8_scratch_avxvnni(int64_t depth);
int64_t int8_scratch_avxvnni_evex(int64_t depth);
int64_t int8_scratch_avx512vnni(int64_t depth);
int64_t int8_scratch_neondot(int64_t depth);
int64_t int8_scratch_neoni8mm(int64_t depth);
int64_t int4_scratch_neondot(int64_t depth);
int64_t int4_scratch_scalar(int64_t depth);
int64_t int4_scratch_avx2(int64_t depth);
int64_t int4_scratch_avxvnni(int64_t depth);
int64_t int4_scratch_avxvnni_evex(int64_t depth);
int64_t int4_scratch_avx512vnni(int64_t depth);

constexpr LinearKernels kLinearScalar = {int8_tile_scalar, int4_tile_scalar, int8_scratch_scalar, int4_scratch_scalar};
constexpr LinearKernels kLinearAvx2 = {int8_tile_avx2, int4_tile_avx2, int8_scratch_avx2, int4_scratch_avx2};
constexpr LinearKernels kLinearAvxVnni = {int8_tile_avxvnni, int4_tile_avxvnni, int8_scratch_avxvnni,
                                          int4_scratch_avxvnni};
constexpr LinearKernels kLinearAvxVnniEvex = {int8_tile_avxvnni_evex, int4_tile_avxvnni_evex,
                                              int8_scratch_avxvnni_evex, int4_scratch_avxvnni_evex};
constexpr LinearKernels kLinearAvx512 = {int8_tile_avx512vnni, int4_tile_avx512vnni, int8_scratch_avx512vnni,
                                         int4_scratch_avx512vnni};
constexpr LinearKernels kLinearNeonDot = {int8_tile_neondot, int4_tile_neondot, int8_scratch_neondot,
                                          int4_scratch_neondot};
constexpr LinearKernels kLinearNeonI8mm = {int8_tile_neoni8mm, int4_tile_neondot, int8_scratch_neoni8mm,
                                           int4_scratch_neondot};
constexpr Tiers<LinearKernels> kLinearTiers = {
    .scalar = &kLinearScalar,
    .avx2 = NARROWCAST_X86_BODY(kLinearAvx2),
    .avxvnni_evex = NARROWCAST_X86_BODY(kLinearAvxVnniEvex),
    .avxvnni = NARROWCAST_X86_BODY(kLinearAvxVnni),
    .avx512vnni = NARROWCAST_X86_BODY(kLinearAvx512),
    .neondot = NARROWCAST_ARM_BODY(kLinearNeonDot),
    .neoni8mm = NARROWCAST_ARM_BODY(kLinearNeonI8mm),
};

}  // namespace narrowcast
