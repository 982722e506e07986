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

template <bool kLate, bool kCoded>
NC_INLINE void finish_value(const Tail& tail, Float y, uint8_t* target, uint8_t* floats, int64_t c, int64_t n) {
  if constexpr (kLate) {
    y = tail.swish ? hard_swish(y) : clamp(y, tail.active_low, tail.active_high);
    if (floats != nullptr) store_value<false>(floats, c, n, y);
    y = add(multiply(y, tail.inverse), tail.zero);
  }
  store_value<kCoded>(target, c, n, clamp(y, tail.low, tail.high));
}

enum class Second { none, codes, floats };

template <Second kSecond, bool kLate, bool kCoded>
void finish_block(const FinishBlock& block, const FinishTerms& terms) {
  for (int64_t c = 0; c < block.channels; c += kLanes) {
    const int64_t n = block.channels - c;
    const Float multiplier = load_up_to(terms.multiplier + c, n), offset = load_up_to(terms.offset + c, n);
    const Tail tail = make_tail(terms.tail, c, n);
    Float second = multiplier;
    if constexpr (kSecond != Second::none) second = load_up_to(terms.second_multiplier + c, n);
    // Copies of the fields: stores of bytes may alias whatever lies in memory.
    const int32_t* sums = block.sums + c;
    const int64_t sums_stride = block.sums_stride, target_step = block.target_step, second_step = block.second_step;
    for (const PixelRun *run = block.runs, *end = run + block.run_count; run < end; ++run) {
      uint8_t* target = run->target + block.target_offset;
      const uint8_t* added = run->second + block.second_offset;
      uint8_t* floats = kLate && run->floats != nullptr ? run->floats + block.floats_offset : nullptr;
      const int64_t pixels = run->pixels, floats_step = kLate && floats != nullptr ? block.floats_step : 0;
      for (int64_t p = 0; p < pixels; ++p, sums += sums_stride) {
        Float y = add(multiply(to_float(load_int(sums)), multiplier), offset);
        if constexpr (kSecond != Second::none) {
          y = add(y, multiply(load_value<kSecond == Second::codes>(added, c, n), second));
          added += second_step;
        }
        finish_value<kLate, kCoded>(tail, y, target, floats, c, n);
        target += target_step;
        if constexpr (kLate) floats += floats_step;
      }
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

void max_codes(const PoolWindow& window, int64_t channels, uint8_t* target) {
  for (int64_t c = 0; c < channels; c += kLanes) {
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

constexpr NetworkKernels make_network_kernels() {
  return {finish, max_codes, max_floats, average, add_pixels, dequantize_pixels};
}

}  // namespace
}  // namespace narrowcast
