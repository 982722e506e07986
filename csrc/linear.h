// Linear layers on quantized activations. Weights are read in their stored row-major layout; a kernel that wants
// another order copies a tile of columns into the caller's scratch, never the whole matrix.
#pragma once

#include "kernels.h"

namespace narrowcast {

// An activation function applied in float32 behind the bias.
enum class Fused : int { none = 0, relu = 1, gelu = 2, gelu_tanh = 3, silu = 4 };

// out[m, n] = fused(float(sum_k codes[m, k] * weight[n, k] - row_offset[m] * offset[n]) * (row_scale[m] * scale[n])
//   + bias[n])
struct Int8Linear {
  const uint8_t* codes;       // [rows, code_stride], uint8
  int64_t code_stride;        // a multiple of 64, >= depth; what lies behind `depth` does not matter
  const float* row_scale;     // [rows]
  const int32_t* row_offset;  // [rows] the zero point where a row has one, 1 where `offset` holds it
  const int8_t* weight;       // [columns, depth], or interleaved (see interleaved.h)
  const float* scale;         // [columns]
  const int32_t* offset;      // [columns] what zero points add to the sums, divided by row_offset
  const float* bias;          // [columns] or null
  Fused fused;
  int64_t depth;
  void* out;                  // [rows, out_stride]
  int64_t out_stride;         // in elements
  FloatType out_type;
};

struct Range {
  int64_t begin, end;
};

struct LinearKernels {
  // Computes the given rows and columns of the output; `scratch` has int8_scratch(depth) bytes, 64-byte aligned.
  void (*int8_tile)(const Int8Linear& problem, Range rows, Range columns, void* scratch);
  int64_t (*int8_scratch)(int64_t depth);
  // The same for interleaved weights, with int8_interleaved_scratch(depth) bytes; null where a tier has no body for them.
  void (*int8_interleaved)(const Int8Linear& problem, Range rows, Range columns, void* scratch) = nullptr;
};

// Columns per task: a multiple of every tier's register tile, so that a task boundary never splits one.
constexpr int64_t kColumnTile = 64;

// What any tier's int8_interleaved wants: the codes of 4 rows as int16, rows of whole chunks of 32.
constexpr int64_t int8_interleaved_scratch(int64_t depth) { return (depth + 31) / 32 * 32 * 2 * 4; }

// The tile kernels, one file per tier.
void int8_tile_scalar(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avx2(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avxvnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avxvnni_evex(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_avx512vnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_neondot(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_tile_neoni8mm(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_interleaved_avx2(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_interleaved_avxvnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_interleaved_avxvnni_evex(const Int8Linear& problem, Range rows, Range columns, void* scratch);
void int8_interleaved_avx512vnni(const Int8Linear& problem, Range rows, Range columns, void* scratch);
int64_t int8_scratch_scalar(int64_t depth);
int64_t int8_scratch_avx2(int64_t depth);
int64_t int8_scratch_avxvnni(int64_t depth);
int64_t int8_scratch_avxvnni_evex(int64_t depth);
int64_t int8_scratch_avx512vnni(int64_t depth);
int64_t int8_scratch_neondot(int64_t depth);
int64_t int8_scratch_neoni8mm(int64_t depth);

constexpr LinearKernels kLinearScalar = {int8_tile_scalar, int8_scratch_scalar};
constexpr LinearKernels kLinearAvx2 = {int8_tile_avx2, int8_scratch_avx2, int8_interleaved_avx2};
constexpr LinearKernels kLinearAvxVnni = {int8_tile_avxvnni, int8_scratch_avxvnni, int8_interleaved_avxvnni};
constexpr LinearKernels kLinearAvxVnniEvex = {int8_tile_avxvnni_evex, int8_scratch_avxvnni_evex,
                                            int8_interleaved_avxvnni_evex};
constexpr LinearKernels kLinearAvx512 = {int8_tile_avx512vnni, int8_scratch_avx512vnni,
                                       int8_interleaved_avx512vnni};
constexpr LinearKernels kLinearNeonDot = {int8_tile_neondot, int8_scratch_neondot};
constexpr LinearKernels kLinearNeonI8mm = {int8_tile_neoni8mm, int8_scratch_neoni8mm};
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
