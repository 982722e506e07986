// Kernels of integer networks written once on the vector operations of conv_vector_*.h: epilogues, pools, additions.
#pragma once

#include "conv_vector_parts.h"
#include "network_kernels.h"

namespace narrowcast {
namespace {

NC_INLINE Int load_codes(const uint8_t* p) {
  // Reads a whole vector's bytes: code buffers have room behind them.
  return and_int(load_signed_bytes(reinterpret_cast<const int8_t*>(p)), spread_int(0xff));
}

template <bool kCoded>
NC_INLINE Float load_value(const uint8_t* pixel, int64_t channel, int64_t n) {
  if constexpr (kCoded) return to_float(load_codes(pixel + channel));
  return load_up_to(reinterpret_cast<const float*>(pixel) + channel, n);
}

template <bool kCoded>
NC_INLINE void store_value(uint8_t* pixel, int64_t channel, int64_t n, Float y) {
  if constexpr (kCoded) {
    const Int code = to_int(y);
    n >= kLanes ? store_low_bytes(pixel + channel, code) : store_low_bytes_part(pixel + channel, n, code);
  } else {
    store_up_to(reinterpret_cast<float*>(pixel) + channel, n, y);
  }
}

NC_INLINE Float hard_swish(Float y) {
  const Float gate = clamp(add(y, spread(3.0f)), spread(0.0f), spread(6.0f));
  return multiply(y, multiply(gate, spread(1.0f / 6.0f)));
}

// A FinishTail for the channels of one vector.
struct Tail {
  Float low, high, inverse, zero, active_low, active_high;
  bool swish;
};

NC_INLINE Tail make_tail(const FinishTail& terms, int64_t c, int64_t n) {
  const Float infinity = spread(__builtin_inff());
  Tail tail = {load_up_to(terms.low + c, n), load_up_to(terms.high + c, n), infinity, infinity, infinity, infinity,
               terms.activation == Activation::hard_swish};
  if (terms.inverse == nullptr) return tail;
  tail.inverse = load_up_to(terms.inverse + c, n), tail.zero = load_up_to(terms.zero + c, n);
  const bool rectifies = terms.activation == Activation::relu || terms.activation == Activation::relu6;
  tail.active_low = rectifies ? spread(0.0f) : subtract(spread(0.0f), infinity);
  if (terms.activation == Activation::relu6) tail.active_high = spread(6.0f);
  return tail;
}

// Everything but the last clamp.
template <bool kLate>
NC_INLINE Float activate(const Tail& tail, Float y, uint8_t* floats, int64_t c, int64_t n) {
  if constexpr (!kLate) return y;
  y = tail.swish ? hard_swish(y) : clamp(y, tail.active_low, tail.active_high);
  if (floats != nullptr) store_value<false>(floats, c, n, y);
  return add(multiply(y, tail.inverse), tail.zero);
}

template <bool kLate, bool kCoded>
NC_INLINE void finish_value(const Tail& tail, Float y, uint8_t* target, uint8_t* floats, int64_t c, int64_t n) {
  store_value<kCoded>(target, c, n, clamp(activate<kLate>(tail, y, floats, c, n), tail.low, tail.high));
}

enum class Second { none, codes, floats };

// Channels [channel, channel + count) of a block: constants in registers, addresses that move from pixel to pixel.
template <Second kSecond, bool kLate, bool kCoded>
struct Finisher {
  Float multiplier, offset, second;
  Tail tail;
  int64_t channel, count, sums_stride, target_step, second_step, floats_step;
  const int32_t* sums;
  uint8_t* target;
  const uint8_t* added;
  uint8_t* floats;

  [[gnu::always_inline]] inline Float next_sum() {
    Float y = add(multiply(to_float(load_int(sums)), multiplier), offset);
    sums += sums_stride;
    if constexpr (kSecond != Second::none) {
      y = add(y, multiply(load_value<kSecond == Second::codes>(added, channel, count), second));
      added += second_step;
    }
    return y;
  }

  [[gnu::always_inline]] inline void finish_one() {
    finish_value<kLate, kCoded>(tail, next_sum(), target, floats, channel, count);
    target += target_step;
    if constexpr (kLate) floats += floats_step;
  }

  // The clamp from below is one of bytes: rounding keeps the order.
  [[gnu::always_inline]] inline void finish_four(Packed low) {
    Int codes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      codes[i] = to_int(at_most(activate<kLate>(tail, next_sum(), floats, channel, kLanes), tail.high));
      if constexpr (kLate) floats += floats_step;
    }
    store_pixels(target + channel, target_step, at_least(pack_pixels(codes), low));
    target += 4 * target_step;
  }
};

template <Second kSecond, bool kLate, bool kCoded>
void finish_block(const FinishBlock& block, const FinishTerms& terms) {
  for (int64_t c = 0; c < block.channels; c += kLanes) {
    const int64_t n = block.channels - c;
    Finisher<kSecond, kLate, kCoded> f;
    f.multiplier = load_up_to(terms.multiplier + c, n), f.offset = load_up_to(terms.offset + c, n);
    f.tail = make_tail(terms.tail, c, n);
    f.second = f.multiplier;
    if constexpr (kSecond != Second::none) f.second = load_up_to(terms.second_multiplier + c, n);
    const Int lowest = to_int(at_most(f.tail.low, f.tail.high)), four[4] = {lowest, lowest, lowest, lowest};
    const Packed low = pack_pixels(four);
    f.channel = c, f.count = n, f.sums = block.sums + c;
    f.sums_stride = block.sums_stride, f.target_step = block.target_step, f.second_step = block.second_step;
    for (const PixelRun *run = block.runs, *end = run + block.run_count; run < end; ++run) {
      f.target = run->target + block.target_offset, f.added = run->second + block.second_offset;
      f.floats = kLate && run->floats != nullptr ? run->floats + block.floats_offset : nullptr;
      f.floats_step = f.floats != nullptr ? block.floats_step : 0;
      int64_t pixels = run->pixels;
      if (kCoded && n >= kLanes) {
        for (; pixels >= 4; pixels -= 4) f.finish_four(low);
      }
      for (; pixels > 0; --pixels) f.finish_one();
    }
  }
}

template <Second kSecond, bool kLate>
NC_INLINE void finish_as(const FinishBlock& block, const FinishTerms& terms) {
  if (terms.tail.target_coded) return finish_block<kSecond, kLate, true>(block, terms);
  finish_block<kSecond, kLate, false>(block, terms);
}

template <Second kSecond>
NC_INLINE void finish_with(const FinishBlock& block, const FinishTerms& terms) {
  if (terms.tail.inverse != nullptr) return finish_as<kSecond, true>(block, terms);
  finish_as<kSecond, false>(block, terms);
}

void finish(const FinishBlock& block, const FinishTerms& terms) {
  if (terms.second_multiplier == nullptr) return finish_with<Second::none>(block, terms);
  if (terms.second_coded) return finish_with<Second::codes>(block, terms);
  finish_with<Second::floats>(block, terms);
}

// Many codes at once, in whatever registers there are.
constexpr int64_t kCodes = kLanes >= 4 ? 4 * kLanes : 16;
typedef uint8_t Codes __attribute__((vector_size(kCodes)));

void max_codes(const PoolWindow& window, int64_t channels, uint8_t* target) {
  int64_t c = 0;
  for (; c + kCodes <= channels; c += kCodes) {
    Codes best = {};
    for (int64_t y = 0; y < window.rows; ++y) {
      const uint8_t* at = window.data + y * window.row_step + c;
      for (int64_t x = 0; x < window.columns; ++x, at += window.column_step) {
        Codes codes;
        __builtin_memcpy(&codes, at, sizeof(codes));
        best = best > codes ? best : codes;
      }
    }
    __builtin_memcpy(target + c, &best, sizeof(best));
  }
  for (; c < channels; c += kLanes) {
    Int best = zero_int();
    for (int64_t y = 0; y < window.rows; ++y) {
      const uint8_t* at = window.data + y * window.row_step + c;
      for (int64_t x = 0; x < window.columns; ++x, at += window.column_step) {
        best = max_unsigned(best, load_codes(at));
      }
    }
    const int64_t n = channels - c;
    n >= kLanes ? store_low_bytes(target + c, best) : store_low_bytes_part(target + c, n, best);
  }
}

void max_floats(const PoolWindow& window, int64_t channels, float* target) {
  const Float infinity = spread(__builtin_inff());
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    Float best = subtract(spread(0.0f), infinity);
    for (int64_t y = 0; y < window.rows; ++y) {
      const uint8_t* at = window.data + y * window.row_step;
      for (int64_t x = 0; x < window.columns; ++x, at += window.column_step) {
        best = clamp(best, load_value<false>(at, c, n), infinity);
      }
    }
    store_up_to(target + c, n, best);
  }
}

template <bool kSource, bool kTarget>
void average_as(const PoolWindow& window, int64_t channels, const AverageTerms& terms, uint8_t* target) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    Int codes = zero_int();
    Float total = spread(0.0f);
    if (kSource && terms.outside != nullptr) {
      codes = to_int(multiply(load_up_to(terms.outside + c, n), spread(terms.outside_count)));
    }
    for (int64_t y = 0; y < window.rows; ++y) {
      const uint8_t* at = window.data + y * window.row_step;
      for (int64_t x = 0; x < window.columns; ++x, at += window.column_step) {
        if constexpr (kSource) codes = add_int(codes, load_codes(at + c));
        else total = add(total, load_value<false>(at, c, n));
      }
    }
    if constexpr (kSource) total = to_float(codes);
    const Float mean = multiply(total, spread(terms.inverse_count));
    const Float y = add(multiply(mean, load_up_to(terms.multiplier + c, n)), load_up_to(terms.offset + c, n));
    store_value<kTarget>(target, c, n, clamp(y, load_up_to(terms.low + c, n), load_up_to(terms.high + c, n)));
  }
}

void average(const PoolWindow& window, int64_t channels, const AverageTerms& terms, uint8_t* target) {
  if (terms.source_coded && terms.target_coded) return average_as<true, true>(window, channels, terms, target);
  if (terms.source_coded) return average_as<true, false>(window, channels, terms, target);
  if (terms.target_coded) return average_as<false, true>(window, channels, terms, target);
  average_as<false, false>(window, channels, terms, target);
}

template <bool kSource, bool kSecond>
void add_as(const AddRow& all, const FinishTail& terms) {
  const AddRow row = all;  // stores of bytes may alias what `all` refers to
  for (int64_t c = 0; c < row.channels; c += kLanes) {
    const int64_t n = row.channels - c;
    const Float multiplier = load_up_to(row.multiplier + c, n), second = load_up_to(row.second_multiplier + c, n);
    const Float offset = load_up_to(row.offset + c, n);
    const Tail tail = make_tail(terms, c, n);
    for (int64_t p = 0; p < row.pixels; ++p) {
      const Float a = multiply(load_value<kSource>(row.source + p * row.source_step, c, n), multiplier);
      const Float b = multiply(load_value<kSecond>(row.second + p * row.second_step, c, n), second);
      const Float y = add(add(a, b), offset);
      uint8_t* target = row.target + p * row.target_step;
      uint8_t* floats = row.floats != nullptr ? row.floats + p * row.floats_step : nullptr;
      if (terms.inverse != nullptr) {
        if (terms.target_coded) finish_value<true, true>(tail, y, target, floats, c, n);
        else finish_value<true, false>(tail, y, target, floats, c, n);
      } else {
        if (terms.target_coded) finish_value<false, true>(tail, y, target, floats, c, n);
        else finish_value<false, false>(tail, y, target, floats, c, n);
      }
    }
  }
}

void add_pixels(const AddRow& row, const FinishTail& tail) {
  if (row.source_coded && row.second_coded) return add_as<true, true>(row, tail);
  if (row.source_coded) return add_as<true, false>(row, tail);
  if (row.second_coded) return add_as<false, true>(row, tail);
  add_as<false, false>(row, tail);
}

void dequantize_pixels(const uint8_t* source, int64_t source_step, float* target, int64_t target_step, int64_t pixels,
                       int64_t channels, const float* scale, const float* zero) {
  for (int64_t c = 0; c < channels; c += kLanes) {
    const int64_t n = channels - c;
    const Float by = load_up_to(scale + c, n), from = load_up_to(zero + c, n);
    for (int64_t p = 0; p < pixels; ++p) {
      const Float code = to_float(load_codes(source + p * source_step + c));
      float* to = reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(target) + p * target_step);
      store_up_to(to + c, n, multiply(subtract(code, from), by));
    }
  }
}

}  // namespace
}  // namespace narrowcast
