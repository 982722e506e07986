// LSTM and GRU cells written once on the vector operations of conv_vector_*.h. exp, sigmoid and tanh follow Cephes
// (expf.c, tanhf.c) operation by operation, so that every tier and the torch reference give the same bits;
// error below 2e-7 absolute. No fused multiply-add.
#pragma once

#include "recurrent_kernels.h"

namespace narrowcast {
namespace {

NC_INLINE Float load_some(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_part(p, n); }
NC_INLINE void store_some(float* p, int64_t n, Float v) { n >= kLanes ? store(p, v) : store_part(p, n, v); }

NC_INLINE Float step(Float total, Float x, float coefficient) { return add(multiply(total, x), spread(coefficient)); }

NC_INLINE Float exponential(Float x) {
  x = clamp(x, spread(-87.0f), spread(88.0f));
  const Int whole = to_int(multiply(x, spread(1.44269504088896341f)));
  const Float n = to_float(whole);
  // log 2 in two parts: the product with the first is exact.
  Float rest = subtract(x, multiply(n, spread(0.693359375f)));
  rest = subtract(rest, multiply(n, spread(-2.12194440e-4f)));
  Float total = step(spread(1.9875691500e-4f), rest, 1.3981999507e-3f);
  total = step(total, rest, 8.3334519073e-3f);
  total = step(total, rest, 4.1665795894e-2f);
  total = step(total, rest, 1.6666665459e-1f);
  total = step(total, rest, 5.0000001201e-1f);
  total = add(add(multiply(multiply(total, rest), rest), rest), spread(1.0f));
  return bits_float(add_int(float_bits(total), shift_left<23>(whole)));
}

NC_INLINE Float sigmoid(Float x) {
  const Float one = spread(1.0f);
  return divide(one, add(one, exponential(subtract(spread(0.0f), x))));
}

NC_INLINE Float hyperbolic_tangent(Float x) {
  const Int sign = and_int(float_bits(x), spread_int(INT32_MIN));
  const Float size = bits_float(and_int(float_bits(x), spread_int(0x7fffffff)));
  const Float one = spread(1.0f), square = multiply(x, x);
  const Float large = subtract(one, divide(spread(2.0f), add(exponential(add(size, size)), one)));
  Float total = step(spread(-5.70498872745e-3f), square, 2.06390887954e-2f);
  total = step(total, square, -5.37397155531e-2f);
  total = step(total, square, 1.33314422036e-1f);
  total = step(total, square, -3.33332819422e-1f);
  const Float small = add(multiply(multiply(total, square), x), x);
  return select_less(size, spread(0.625f), small, bits_float(or_int(float_bits(large), sign)));
}

void lstm_cell(const float* from_input, const float* from_state, int64_t hidden, float* cell, float* state) {
  for (int64_t j = 0; j < hidden; j += kLanes) {
    const int64_t n = hidden - j;
    Float gate[4];
#pragma GCC unroll 4
    for (int g = 0; g < 4; ++g) {
      gate[g] = add(load_some(from_input + g * hidden + j, n), load_some(from_state + g * hidden + j, n));
    }
    const Float kept = multiply(sigmoid(gate[1]), load_some(cell + j, n));
    const Float memory = add(kept, multiply(sigmoid(gate[0]), hyperbolic_tangent(gate[2])));
    store_some(cell + j, n, memory);
    store_some(state + j, n, multiply(sigmoid(gate[3]), hyperbolic_tangent(memory)));
  }
}

void gru_cell(const float* from_input, const float* from_state, int64_t hidden, float* state) {
  for (int64_t j = 0; j < hidden; j += kLanes) {
    const int64_t n = hidden - j;
    const float *input = from_input + j, *hid = from_state + j;
    const Float reset = sigmoid(add(load_some(input, n), load_some(hid, n)));
    const Float update = sigmoid(add(load_some(input + hidden, n), load_some(hid + hidden, n)));
    const Float recalled = multiply(reset, load_some(hid + 2 * hidden, n));
    const Float fresh = hyperbolic_tangent(add(load_some(input + 2 * hidden, n), recalled));
    const Float before = load_some(state + j, n);
    store_some(state + j, n, add(fresh, multiply(update, subtract(before, fresh))));
  }
}

// Four codes of a row as the bits of one float; zero beyond the end.
NC_INLINE Float row_words(const int8_t* row, int64_t columns, int64_t word) {
  const int64_t left = columns - 4 * word;
  if (left >= 4 * kLanes) return load(reinterpret_cast<const float*>(row + 4 * word));
  alignas(64) int8_t padded[4 * kLanes] = {};
  for (int64_t i = 0; i < left; ++i) padded[i] = row[4 * word + i];
  return load(reinterpret_cast<const float*>(padded));
}

void pack_rows(const int8_t* weight, int64_t rows, int64_t columns, int8_t* panels) {
  const int64_t words = (columns + 3) / 4;
  for (int64_t row = 0; row < (rows + 15) / 16 * 16; row += kLanes) {
    float* to = reinterpret_cast<float*>(panels + row / 16 * words * 64 + row % 16 * 4);
    for (int64_t word = 0; word < words; word += kLanes) {
      Float block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        block[i] = row + i < rows ? row_words(weight + (row + i) * columns, columns, word) : spread(0.0f);
      }
      transpose(block);
      const int64_t n = words - word < kLanes ? words - word : kLanes;
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (i < n) store(to + 16 * (word + i), block[i]);
      }
    }
  }
}

constexpr RecurrentKernels make_recurrent_kernels() { return {pack_rows, lstm_cell, gru_cell}; }

}  // namespace
}  // namespace narrowcast
