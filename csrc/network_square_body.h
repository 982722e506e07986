// Depthwise convolution from interleaved words to codes without sums in memory, for square kernels.
#pragma once

#include "conv_square.h"
#include "network_body.h"

namespace narrowcast {
namespace {

template <int kKernel, int kStride>
void square_codes(const DepthwiseRow& row, const FinishTerms& terms, uint8_t* target, int64_t step) {
  constexpr int kPhases = Square<kKernel, kStride>::kPhases;
  const int64_t width = row.width, row_stride = row.row_stride;
  for (int c = 0; c < 16; c += kLanes) {
    Square<kKernel, kStride> square;
    load_square(square, row.weights, c);
    const Float multiplier = load(terms.multiplier + c), offset = load(terms.offset + c);
    const Float high = load(terms.tail.high + c);
    const Int lowest = to_int(at_most(load(terms.tail.low + c), high)), all[4] = {lowest, lowest, lowest, lowest};
    const Packed low = pack_pixels(all);
    const uint8_t* from = row.words + 4 * c;
    uint8_t* to = target + c;
    for (int64_t x = 0; x < width; x += 4, to += 4 * step) {
      Int codes[4];
#pragma GCC unroll 2
      for (int first = 0; first < 4; first += kPhases, from += square.kAdvance) {
        square_sums(square, from, row_stride, codes + first);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        codes[i] = to_int(at_most(add(multiply(to_float(codes[i]), multiplier), offset), high));
      }
      const Packed packed = at_least(pack_pixels(codes), low);
      if (x + 4 <= width) {
        store_pixels(to, step, packed);
        continue;
      }
      alignas(64) uint8_t four[4 * kLanes];
      store_pixels(four, kLanes, packed);
      for (int64_t i = 0; i < width - x; ++i) __builtin_memcpy(to + i * step, four + i * kLanes, kLanes);
    }
  }
}

bool depthwise_codes(const DepthwiseRow& row, int square, int stride, const FinishTerms& terms, uint8_t* target,
                     int64_t step) {
  const bool plain = terms.second_multiplier == nullptr && terms.tail.inverse == nullptr && terms.tail.target_coded;
  if (!plain || square == 0) return false;
  if (square == 3 && stride == 1) square_codes<3, 1>(row, terms, target, step);
  if (square == 3 && stride == 2) square_codes<3, 2>(row, terms, target, step);
  if (square == 5 && stride == 1) square_codes<5, 1>(row, terms, target, step);
  if (square == 5 && stride == 2) square_codes<5, 2>(row, terms, target, step);
  return true;
}

constexpr NetworkKernels make_network_kernels() {
  return {finish, max_codes, max_floats, average, add_pixels, dequantize_pixels, depthwise_codes};
}

}  // namespace
}  // namespace narrowcast
