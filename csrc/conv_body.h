// Convolution kernels written once on the vector operations of conv_vector_*.h: quantize, dot products, epilogue.
#pragma once

#include "conv_kernels.h"
#include "conv_vector_parts.h"

namespace narrowcast {
namespace {

NC_INLINE Int magnitude(Float v) { return and_int(float_bits(v), spread_int(0x7fffffff)); }
NC_INLINE int64_t smaller(int64_t value, int64_t limit) { return value < limit ? value : limit; }

uint32_t magnitude_bits(const float* values, int64_t count, uint32_t seed) {
  Int best = spread_int(static_cast<int32_t>(seed)), other = best;
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    best = max_unsigned(best, magnitude(load(values + i)));
    other = max_unsigned(other, magnitude(load(values + i + kLanes)));
  }
  for (; i < count; i += kLanes) best = max_unsigned(best, magnitude(load_up_to(values + i, count - i)));
  return largest_unsigned(max_unsigned(best, other));
}

struct Encoder {
  Float inverse, low, high;
  int32_t zero_point;
  Float seen;  // NaN once a value was not finite
};

NC_INLINE Encoder make_encoder(CodeRange range) {
  return {spread(range.inverse), spread(range.low), spread(range.high), range.zero_point, spread(0.0f)};
}

NC_INLINE uint32_t seen_bits(const Encoder& encoder) { return any_nan(encoder.seen) ? 0x7fc00000u : 0u; }

// Code minus zero point, not yet held up to the lower bound: packing to bytes saturates there.
NC_INLINE Int encode(Encoder& encoder, Float v) {
  encoder.seen = watch(encoder.seen, v);
  return to_int(at_most(multiply(v, encoder.inverse), encoder.high));
}

constexpr int64_t kPrefetch = 128;  // floats

// Up to four channels of up to kLanes pixels; lane x = the four codes of pixel x.
NC_INLINE Int encode_word(Encoder& encoder, const float* source, int64_t plane_stride, int64_t channels, int64_t n) {
  Int codes[4] = {zero_int(), zero_int(), zero_int(), zero_int()};
#pragma GCC unroll 4
  for (int64_t c = 0; c < 4; ++c) {
    if (c >= channels) break;
    // The planes are too many streams for the hardware: ask for what the next rows read.
    __builtin_prefetch(source + c * plane_stride + kPrefetch);
    codes[c] = encode(encoder, load_up_to(source + c * plane_stride, n));
  }
  return pack_lanes(codes, encoder.zero_point);
}

NC_INLINE void store_words(uint8_t* codes, int64_t pixel_stride, int64_t n, Int word) {
  if (pixel_stride == 4 && n == kLanes) return store_int(reinterpret_cast<int32_t*>(codes), word);
  alignas(64) int32_t lanes[kLanes];
  store_int(lanes, word);
  if (pixel_stride == 4) {
    __builtin_memcpy(codes, lanes, static_cast<uint64_t>(4 * n));
    return;
  }
  for (int64_t x = 0; x < n; ++x) __builtin_memcpy(codes + x * pixel_stride, lanes + x, 4);
}

uint32_t quantize_planes(const float* source, int64_t plane_stride, int64_t channels, int64_t width, CodeRange range,
                         uint8_t* codes, int64_t pixel_stride) {
  Encoder encoder = make_encoder(range);
  for (int64_t x = 0; x < width; x += kLanes) {
    const int64_t n = smaller(width - x, kLanes);
    uint8_t* to = codes + x * pixel_stride;
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) {
      const float* from = source + c * plane_stride + x;
      Int quad[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) quad[i] = encode_word(encoder, from + 4 * i * plane_stride, plane_stride, 4, n);
      store_four_words(to + c, pixel_stride, n, quad);
    }
    for (; c < channels; c += 4) {
      const float* from = source + c * plane_stride + x;
      store_words(to + c, pixel_stride, n, encode_word(encoder, from, plane_stride, channels - c, n));
    }
  }
  return seen_bits(encoder);
}

// Four vectors from `source`, `stride` floats apart.
NC_INLINE void encode_four(Encoder& encoder, const float* source, int64_t stride, uint8_t* codes) {
  Int four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) four[i] = encode(encoder, load(source + i * stride));
  store_packed(codes, four, encoder.zero_point);
}

NC_INLINE void encode_run(Encoder& encoder, const float* source, int64_t count, uint8_t* codes) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) encode_four(encoder, source + i, kLanes, codes + i);
  for (int64_t left = count - i; left > 0; left -= kLanes, i += kLanes) {
    const Float v = load_up_to(source + i, left);
    encoder.seen = watch(encoder.seen, v);
    const Int code = add_int(to_int(clamp(multiply(v, encoder.inverse), encoder.low, encoder.high)),
                             spread_int(encoder.zero_point));
    left >= kLanes ? store_low_bytes(codes + i, code) : store_low_bytes_part(codes + i, left, code);
  }
}

uint32_t quantize_pixels(const float* source, int64_t source_stride, int64_t channels, int64_t width, CodeRange range,
                         uint8_t* codes, int64_t pixel_stride) {
  Encoder encoder = make_encoder(range);
  int64_t x = 0;
  if (channels == kLanes && pixel_stride == kLanes) {
    for (; x + 4 <= width; x += 4) {
      // A slice of the channels: short reads far apart.
      for (int64_t i = 0; i < 4; ++i) __builtin_prefetch(source + (x + 16 + i) * source_stride);
      encode_four(encoder, source + x * source_stride, source_stride, codes + x * pixel_stride);
    }
  }
  for (; x < width; ++x) encode_run(encoder, source + x * source_stride, channels, codes + x * pixel_stride);
  return seen_bits(encoder);
}

// What the sums of every row start from where the dot product takes codes less 128.
template <int kColumns>
void start_sums(const DotBlock& block, int32_t* start) {
  constexpr int kSplit = 16 / kLanes;
  Int total[kColumns];
  for (int c = 0; c < kColumns; ++c) total[c] = zero_int();
  for (int64_t step = 0; step < block.taps * block.steps; ++step) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) {
      const int8_t* panel = block.panel + (c / kSplit) * block.panel_stride + (c % kSplit) * 4 * kLanes;
      total[c] = start_sum(total[c], load_weights(panel + 64 * step));
    }
  }
  for (int c = 0; c < kColumns; ++c) store_int(start + c * kLanes, total[c]);
}

// The accumulators live in registers during the loop and go to memory raw: with the epilogue in the same function
// GCC 12 keeps them on the stack (35 % of peak instead of 88 %).
template <int kVectors, int kRows>
__attribute__((noinline)) void dot_tile(const DotBlock& block, const uint8_t* const* row,
                                        [[maybe_unused]] const int32_t* start, int32_t* sums) {
  constexpr int kSplit = 16 / kLanes, kColumns = kVectors * kSplit;
  Int total[kRows][kColumns];
  const uint8_t* at[kRows];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    at[r] = row[r];
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) total[r][c] = kSignedCodes ? load_int(start + c * kLanes) : zero_int();
  }
  const int8_t* panel = block.panel;
  const int64_t panel_stride = block.panel_stride, steps = 4 * block.steps;
  for (int64_t tap = 0; tap < block.taps; ++tap) {
    const int64_t begin = block.tap_offset[tap], end = begin + steps;
    for (int64_t k = begin; k < end; k += 4) {
      Weights weights[kColumns];
#pragma GCC unroll 16
      for (int c = 0; c < kColumns; ++c) {
        weights[c] = load_weights(panel + (c / kSplit) * panel_stride + (c % kSplit) * 4 * kLanes);
      }
      panel += 64;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Bytes bytes = spread_bytes(at[r] + k);
#pragma GCC unroll 16
        for (int c = 0; c < kColumns; ++c) total[r][c] = dot(total[r][c], bytes, weights[c]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kColumns; ++c) store_int(sums + (r * kColumns + c) * kLanes, total[r][c]);
  }
}

template <int kVectors, int kRows>
NC_INLINE void dot_rows(const DotBlock& block, int64_t rows, const uint8_t* const* row, const int32_t* start,
                        int32_t* sums) {
  if (rows == kRows) return dot_tile<kVectors, kRows>(block, row, start, sums);
  if constexpr (kRows > 1) dot_rows<kVectors, kRows - 1>(block, rows, row, start, sums);
}

// Equal tiles: 25 rows are 9 + 8 + 8, not 12 + 12 + 1.
template <int kVectors, int kRows>
void dot_tiles(const DotBlock& block) {
  const int64_t tiles = (block.rows + kRows - 1) / kRows;
  int32_t start[kSignedCodes ? kVectors * 16 : 1];
  if constexpr (kSignedCodes) start_sums<kVectors * 16 / kLanes>(block, start);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t begin = block.rows * tile / tiles, end = block.rows * (tile + 1) / tiles;
    dot_rows<kVectors, kRows>(block, end - begin, block.row + begin, start, block.sums + begin * kVectors * 16);
  }
}

void dot_block(const DotBlock& block) {
  if constexpr (kMaxVectors >= 4) {
    if (block.vectors == 4) return dot_tiles<4, kTileRows / 2>(block);
    if (block.vectors == 2) return dot_tiles<2, kTileRows>(block);
  }
  dot_tiles<1, kTileRows>(block);
}

struct Affine {
  Float scale, bias;
  Int offset;
};

NC_INLINE Affine make_affine(const Epilogue& epilogue, int64_t channel, int64_t n) {
  const Float zero = spread(0.0f);
  const Float scale = multiply(spread(epilogue.input_scale), load_up_to(epilogue.scale + channel, n));
  const Int offset = n >= kLanes ? load_int(epilogue.offset + channel) : load_int_part(epilogue.offset + channel, n);
  return {scale, epilogue.bias ? load_up_to(epilogue.bias + channel, n) : zero,
          multiply_int(spread_int(epilogue.offset_factor), offset)};
}

NC_INLINE Float apply(const Affine& affine, Int sum) {
  return add(multiply(to_float(subtract_int(sum, affine.offset)), affine.scale), affine.bias);
}

void store_pixels(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t channels,
                  const Epilogue& epilogue, float* output, int64_t pixel_stride) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    Affine affine = make_affine(epilogue, c, n);
    const Float scale = epilogue.row_scale ? load_up_to(epilogue.scale + c, n) : affine.scale;
    for (int64_t x = 0; x < pixels; ++x) {
      if (epilogue.row_scale) affine.scale = multiply(spread(epilogue.row_scale[x]), scale);
      store_up_to(output + x * pixel_stride + c, n, apply(affine, load_int(sums + x * sums_stride + c)));
    }
  }
}

void store_planes(const int32_t* sums, int64_t sums_stride, int64_t pixels, int64_t channels,
                  const Epilogue& epilogue, float* output, int64_t plane_stride) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t lanes = smaller(channels - c, kLanes);
    const Affine affine = make_affine(epilogue, c, lanes);
    for (int64_t x = 0; x < pixels; x += kLanes) {
      const int64_t n = smaller(pixels - x, kLanes);
      Float rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        rows[i] = i < n ? apply(affine, load_int(sums + (x + i) * sums_stride + c)) : spread(0.0f);
      }
      transpose(rows);
      float* to = output + c * plane_stride + x;
      if (lanes == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store_up_to(to + i * plane_stride, n, rows[i]);
      } else {
        alignas(64) float spill[kLanes][kLanes];
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) store(spill[i], rows[i]);
        for (int64_t i = 0; i < lanes; ++i) store_up_to(to + i * plane_stride, n, load(spill[i]));
      }
    }
  }
}

}  // namespace
}  // namespace narrowcast
