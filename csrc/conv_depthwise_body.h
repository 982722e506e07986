// Depthwise kernels written once on the vector operations of conv_vector_*.h. Four neighbouring x positions of one
// channel share a 32-bit word, so one dot product does four taps; the weights are shifted instead of the data.
#pragma once

#include "conv_channels_body.h"
#include "conv_square.h"

namespace narrowcast {
namespace {

void interleave_words(const uint8_t* pixels, int64_t pixel_stride, int64_t words, uint8_t* output) {
  for (int64_t word = 0; word < words; ++word, output += 64) {
    const uint8_t* from = pixels + 4 * word * pixel_stride;
#if defined(__SSE2__)
    __m128i row[4];
    for (int i = 0; i < 4; ++i) row[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * pixel_stride));
    const __m128i a = _mm_unpacklo_epi8(row[0], row[1]), b = _mm_unpackhi_epi8(row[0], row[1]);
    const __m128i c = _mm_unpacklo_epi8(row[2], row[3]), d = _mm_unpackhi_epi8(row[2], row[3]);
    __m128i* to = reinterpret_cast<__m128i*>(output);
    _mm_storeu_si128(to, _mm_unpacklo_epi16(a, c));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(a, c));
    _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(b, d));
    _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(b, d));
#elif defined(__ARM_NEON)
    uint8x16x4_t row;
    for (int i = 0; i < 4; ++i) row.val[i] = vld1q_u8(from + i * pixel_stride);
    vst4q_u8(output, row);
#else
    for (int channel = 0; channel < 16; ++channel) {
      for (int i = 0; i < 4; ++i) output[4 * channel + i] = from[i * pixel_stride + channel];
    }
#endif
  }
}

template <int kByte>
void spread_tap(const int8_t* tap, int64_t tap_stride, int rows, int64_t row_stride, int8_t* weights) {
  for (int row = 0; row < rows; ++row, tap += tap_stride, weights += row_stride) {
    for (int c = 0; c < 16; c += kLanes) {
      int32_t* to = reinterpret_cast<int32_t*>(weights) + c;
      const Int low = and_int(load_signed_bytes(tap + c), spread_int(0xff));
      store_int(to, or_int(load_int(to), shift_left<8 * kByte>(low)));
    }
  }
}

void depthwise_weights(const int8_t* taps, int kernel_columns, int dilation, int stride, const DepthwiseRow& row,
                       int8_t* weights) {
  const int64_t row_bytes = 64 * row.span, tap_stride = 16 * kernel_columns;
  __builtin_memset(weights, 0, static_cast<uint64_t>(row.phases * row.kernel_rows * row_bytes));
  for (int phase = 0; phase < row.phases; ++phase, weights += row.kernel_rows * row_bytes) {
    for (int kx = 0; kx < kernel_columns; ++kx) {
      const int position = phase * stride + kx * dilation - 4 * row.first[phase];
      const int8_t* tap = taps + 16 * kx;
      int8_t* to = weights + 64 * (position / 4);
      switch (position % 4) {
        case 0: spread_tap<0>(tap, tap_stride, row.kernel_rows, row_bytes, to); break;
        case 1: spread_tap<1>(tap, tap_stride, row.kernel_rows, row_bytes, to); break;
        case 2: spread_tap<2>(tap, tap_stride, row.kernel_rows, row_bytes, to); break;
        default: spread_tap<3>(tap, tap_stride, row.kernel_rows, row_bytes, to); break;
      }
    }
  }
}

void depthwise_any(const DepthwiseRow& row) {
  const int64_t row_bytes = 64 * row.span;
  for (int64_t x = 0, word = 0; x < row.width; x += row.phases, word += row.advance) {
    const int8_t* weights = row.weights;
    for (int phase = 0; phase < row.phases; ++phase) {
      for (int c = 0; c < 16; c += kLanes) {
        const uint8_t* from = row.words + 64 * (word + row.first[phase]) + 4 * c;
        const int8_t* with = weights + 4 * c;
        Int total = zero_int();
        for (int y = 0; y < row.kernel_rows; ++y, from += row.row_stride, with += row_bytes) {
          for (int s = 0; s < row.span; ++s) {
            const Weights weight = load_weights(with + 64 * s);
            total = dot(start_sum(total, weight), load_bytes(from + 64 * s), weight);
          }
        }
        store_int(row.sums + 16 * (x + phase) + c, total);
      }
      weights += row.kernel_rows * row_bytes;
    }
  }
}

template <int kKernel, int kStride>
void depthwise_square(const DepthwiseRow& row) {
  constexpr int kPhases = Square<kKernel, kStride>::kPhases;
  for (int c = 0; c < 16; c += kLanes) {
    Square<kKernel, kStride> square;
    load_square(square, row.weights, c);
    const uint8_t* from = row.words + 4 * c;
    int32_t* to = row.sums + c;
    for (int64_t x = 0; x < row.width; x += kPhases, from += square.kAdvance, to += 16 * kPhases) {
      Int total[kPhases];
      square_sums(square, from, row.row_stride, total);
#pragma GCC unroll 4
      for (int p = 0; p < kPhases; ++p) store_int(to + 16 * p, total[p]);
    }
  }
}

void depthwise_row(const DepthwiseRow& row, int square, int stride) {
  if (square == 3 && stride == 1) return depthwise_square<3, 1>(row);
  if (square == 3 && stride == 2) return depthwise_square<3, 2>(row);
  if (square == 5 && stride == 1) return depthwise_square<5, 1>(row);
  if (square == 5 && stride == 2) return depthwise_square<5, 2>(row);
  depthwise_any(row);
}

constexpr ConvKernels make_conv_kernels() {
  return {magnitude_bits,          quantize_planes,  quantize_pixels, quantize_channel_planes,
          quantize_channel_pixels, interleave_words, kTileRows,       kMaxVectors,
          dot_block,               depthwise_weights, depthwise_row,  store_pixels,
          store_planes};
}

}  // namespace
}  // namespace narrowcast
