// One direction of one LSTM or GRU layer over a whole sequence, for some rows of the batch. Free of torch.
#pragma once

#include <stdint.h>

#include "conv_kernels.h"
#include "recurrent_kernels.h"

namespace narrowcast {

// int8 weights as panels with what the epilogue needs.
struct GateWeights {
  const int8_t* panels;
  const float* scale;
  const int32_t* sum;
  const float* bias;  // may be null
  int64_t columns;
};

struct RecurrentCall {
  int64_t steps, batch, inputs, hidden, gates;  // gates: 4 for LSTM, 3 for GRU
  bool reverse;
  const float* x;  // [steps, batch, inputs]
  GateWeights input, state;
  float* y;      // [steps, batch, hidden]
  float* hidden_state;  // [batch, hidden]: first state in, last state out
  float* cell;   // [batch, hidden], LSTM only: first in, last out
  const ConvKernels* kernels;
  const RecurrentKernels* cells;
};

// Where the first value that is not finite was met.
struct BadRow {
  bool found = false, in_state = false;
  int64_t step = 0, row = 0;
};

int64_t recurrent_scratch_bytes(const RecurrentCall& call, int64_t rows);
BadRow run_rows(const RecurrentCall& call, int64_t row_begin, int64_t row_end, uint8_t* scratch);

}  // namespace narrowcast
