// The torch-free kernels that LSTM and GRU need beside the dot products of conv_kernels.h.
#pragma once

#include "kernels.h"

namespace narrowcast {

struct RecurrentKernels {
  // Row-major int8 [rows, columns] to panels [rows / 16][columns / 4][16][4], both rounded up with zeros.
  void (*pack_rows)(const int8_t* weight, int64_t rows, int64_t columns, int8_t* panels);
  // One row, one step; gate order i, f, g, o. Updates cell and writes state.
  void (*lstm_cell)(const float* from_input, const float* from_state, int64_t hidden, float* cell, float* state);
  // One row, one step; gate order r, z, n. Updates state.
  void (*gru_cell)(const float* from_input, const float* from_state, int64_t hidden, float* state);
};

extern const RecurrentKernels recurrent_scalar;
extern const RecurrentKernels recurrent_avx2;
extern const RecurrentKernels recurrent_avx512vnni;
extern const RecurrentKernels recurrent_neondot;

constexpr Tiers<RecurrentKernels> kRecurrentTiers = {
    .scalar = &recurrent_scalar,
    .avx2 = NARROWCAST_X86_BODY(recurrent_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(recurrent_avx512vnni),
    .neondot = NARROWCAST_ARM_BODY(recurrent_neondot),
};

}  // namespace narrowcast
