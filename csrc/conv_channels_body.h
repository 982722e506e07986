// Quantizers with a range of its own for every channel, written once on the vector operations of conv_vector_*.h.
// They run over all pixels for one block of channels after the other, so that the ranges stay where they are.
#pragma once

#include "conv_body.h"

namespace narrowcast {
namespace {

uint32_t quantize_channel_pixels(const float* source, int64_t source_stride, int64_t channels, int64_t width,
                                 ChannelRange range, uint8_t* codes, int64_t pixel_stride) {
  Int seen = zero_int();
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Float inverse = load_up_to(range.inverse + c, n);
    const Int zero_point = n >= kLanes ? load_int(range.zero_point + c) : load_int_part(range.zero_point + c, n);
    const Float low = subtract(spread(0.0f), to_float(zero_point)), high = add(low, spread(255.0f));
    const float* from = source + c;
    uint8_t* to = codes + c;
    for (int64_t x = 0; x < width; ++x, from += source_stride, to += pixel_stride) {
      const Float v = load_up_to(from, n);
      seen = max_unsigned(seen, magnitude(v));
      const Int code = add_int(to_int(clamp(multiply(v, inverse), low, high)), zero_point);
      n >= kLanes ? store_low_bytes(to, code) : store_low_bytes_part(to, n, code);
    }
  }
  return largest_unsigned(seen);
}

// The ranges of 16 channels.
struct ChannelBlock {
  float inverse[16], low[16], high[16];
  int32_t zero_point[16];
};

NC_INLINE ChannelBlock load_block(ChannelRange range, int64_t channel, int64_t count) {
  ChannelBlock block = {};
  for (int64_t c = 0; c < count; ++c) {
    block.inverse[c] = range.inverse[channel + c];
    block.zero_point[c] = range.zero_point[channel + c];
    block.low[c] = static_cast<float>(-block.zero_point[c]);
    block.high[c] = static_cast<float>(255 - block.zero_point[c]);
  }
  return block;
}

NC_INLINE Int encode_plane(const ChannelBlock& block, int64_t c, Int& seen, const float* source, int64_t n) {
  __builtin_prefetch(source + kPrefetch);
  const Float v = load_up_to(source, n);
  seen = max_unsigned(seen, magnitude(v));
  const Float scaled = clamp(multiply(v, spread(block.inverse[c])), spread(block.low[c]), spread(block.high[c]));
  return add_int(to_int(scaled), spread_int(block.zero_point[c]));
}

// Channels c to c + 3 of up to kLanes pixels, as far as there are `count`; lane x = the four codes of pixel x.
NC_INLINE Int encode_planes(const ChannelBlock& block, int64_t c, int64_t count, Int& seen, const float* source,
                            int64_t plane_stride, int64_t n) {
  Int word = encode_plane(block, c, seen, source, n);
  if (c + 1 < count) word = or_int(word, shift_left<8>(encode_plane(block, c + 1, seen, source + plane_stride, n)));
  if (c + 2 < count) {
    word = or_int(word, shift_left<16>(encode_plane(block, c + 2, seen, source + 2 * plane_stride, n)));
  }
  if (c + 3 < count) {
    word = or_int(word, shift_left<24>(encode_plane(block, c + 3, seen, source + 3 * plane_stride, n)));
  }
  return word;
}

uint32_t quantize_channel_planes(const float* source, int64_t plane_stride, int64_t channels, int64_t width,
                                 ChannelRange range, uint8_t* codes, int64_t pixel_stride) {
  Int seen = zero_int();
  for (int64_t first = 0; first < channels; first += 16, source += 16 * plane_stride, codes += 16) {
    const int64_t count = channels - first < 16 ? channels - first : 16;
    const ChannelBlock block = load_block(range, first, count);
    for (int64_t x = 0; x < width; x += kLanes) {
      const int64_t n = width - x < kLanes ? width - x : kLanes;
      const float* from = source + x;
      uint8_t* to = codes + x * pixel_stride;
      if (count == 16) {
        Int quad[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          quad[i] = encode_planes(block, 4 * i, 16, seen, from + 4 * i * plane_stride, plane_stride, n);
        }
        store_four_words(to, pixel_stride, n, quad);
        continue;
      }
      for (int64_t c = 0; c < count; c += 4) {
        const Int word = encode_planes(block, c, count, seen, from + c * plane_stride, plane_stride, n);
        store_words(to + c, pixel_stride, n, word);
      }
    }
  }
  return largest_unsigned(seen);
}

}  // namespace
}  // namespace narrowcast
