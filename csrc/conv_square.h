// Depthwise convolution with square kernels of 3 and 5 at stride 1 and 2 on interleaved words: the sums of one repeat,
// with all weights in registers where they fit. On the vector operations of conv_vector_*.h.
#pragma once

#include "conv_kernels.h"

namespace narrowcast {
namespace {

template <int kKernel, int kStride>
struct Square {
  static constexpr int kPhases = kStride == 1 ? 4 : 2, kSpan = 2;
  static constexpr int64_t kAdvance = 64 * (kStride * kPhases / 4);  // bytes from one repeat's words to the next one's
  Weights weights[kPhases][kKernel][kSpan];
  Int start[kPhases];

  static constexpr int words_of(int phase) { return ((phase * kStride) % 4 + kKernel - 1) / 4 + 1; }
};

// Weights of kLanes channels from channel c on.
template <int kKernel, int kStride>
NC_INLINE void load_square(Square<kKernel, kStride>& square, const int8_t* weights, int c) {
#pragma GCC unroll 4
  for (int p = 0; p < square.kPhases; ++p) {
    square.start[p] = zero_int();
#pragma GCC unroll 5
    for (int y = 0; y < kKernel; ++y) {
#pragma GCC unroll 2
      for (int s = 0; s < square.kSpan; ++s) {
        square.weights[p][y][s] = load_weights(weights + 64 * ((p * kKernel + y) * square.kSpan + s) + 4 * c);
        if (s < square.words_of(p)) square.start[p] = start_sum(square.start[p], square.weights[p][y][s]);
      }
    }
  }
}

template <int kKernel, int kStride>
NC_INLINE void square_sums(const Square<kKernel, kStride>& square, const uint8_t* words, int64_t row_stride,
                           Int* total) {
#pragma GCC unroll 4
  for (int p = 0; p < square.kPhases; ++p) total[p] = square.start[p];
#pragma GCC unroll 5
  for (int y = 0; y < kKernel; ++y) {
    const Bytes word[2] = {load_bytes(words + y * row_stride), load_bytes(words + y * row_stride + 64)};
#pragma GCC unroll 4
    for (int p = 0; p < square.kPhases; ++p) {
#pragma GCC unroll 2
      for (int s = 0; s < square.kSpan; ++s) {
        if (s < square.words_of(p)) total[p] = dot(total[p], word[s], square.weights[p][y][s]);
      }
    }
  }
}

}  // namespace
}  // namespace narrowcast
