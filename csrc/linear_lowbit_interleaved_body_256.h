// The 256-bit vectors of linear_lowbit_interleaved_body.h. With vpdpbusd every level is its unsigned operand. Without it:
// vpmaddubsw saturates at 32767, so levels below 64 are its unsigned operand and a few of its results are summed in
// int16, as many as fit: 2 * 15 * 127 * 8, 2 * 31 * 127 * 4, 2 * 63 * 127 * 2. Larger weights (int8, nf4) are signed and
// give their sign to the activation: 2 * 128 * 127 fits too. Every product is exact.
#pragma once

#include "linear_lowbit.h"

#include "dot_256.h"
#include "interleaved.h"
#include "simd_avx2.h"

namespace narrowcast {
namespace {

typedef int8_t Bytes __attribute__((vector_size(32)));
typedef uint16_t Words __attribute__((vector_size(32)));
typedef int32_t Int32s __attribute__((vector_size(32)));
typedef float Floats __attribute__((vector_size(32)));

constexpr int kVectorBytes = 32;

inline Bytes look_up(Bytes table, Bytes index) { return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index); }

inline Floats load_scale(const LowBitLinear& problem, int64_t at) {
  return (Floats)(problem.scale_is_half ? load8<FloatType::float16>(problem.scale, at)
                                        : load8<FloatType::float32>(problem.scale, at));
}

inline void store(const LowBitLinear& problem, int64_t at, int64_t count, Floats value) {
  store8(problem.out, problem.out_type, at, count, (__m256)value);
}

inline __m256i broadcast_four(const int8_t* codes) {
  int32_t four;
  __builtin_memcpy(&four, codes, 4);
  return _mm256_set1_epi32(four);
}

#if NARROWCAST_DOT_256
constexpr int kTileRows = 6;

template <int BITS, bool LEVELS>
struct Mode {
  static constexpr bool kSigned = false;
};

template <int ROWS, class Mode>
struct ChunkSums {
  Int32s total[ROWS][2];

  template <int QUAD>
  inline void add(const Bytes* weights, const int8_t* const* codes) {
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      const __m256i a = broadcast_four(codes[r] + 4 * QUAD);
      total[r][0] = (Int32s)dot_bytes((__m256i)total[r][0], (__m256i)weights[0], a);
      total[r][1] = (Int32s)dot_bytes((__m256i)total[r][1], (__m256i)weights[1], a);
    }
  }
};
#else
constexpr int kTileRows = 3;

template <int BITS, bool LEVELS>
struct Mode {
  static constexpr bool kSigned = BITS == 8 || LEVELS;
  static constexpr int kRun = kSigned ? 1 : BITS <= 4 ? 8 : BITS == 5 ? 4 : 2;
};

template <int ROWS, class Mode>
struct ChunkSums {
  Int32s total[ROWS][2];
  __m256i pairs[ROWS][2];

  template <int QUAD>
  inline void add(const Bytes* weights, const int8_t* const* codes) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 3
    for (int r = 0; r < ROWS; ++r) {
      const __m256i a = broadcast_four(codes[r] + 4 * QUAD);
#pragma GCC unroll 2
      for (int p = 0; p < 2; ++p) {
        const auto w = (__m256i)weights[p];
        const __m256i products = Mode::kSigned ? _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w))
                                               : _mm256_maddubs_epi16(w, a);
        pairs[r][p] = QUAD % Mode::kRun == 0 ? products : _mm256_add_epi16(pairs[r][p], products);
        asm("" : "+x"(pairs[r][p]));  // else GCC makes a tree of the chain of additions, whose leaves it spills
        if (QUAD % Mode::kRun != Mode::kRun - 1) continue;
        total[r][p] = (Int32s)_mm256_add_epi32((__m256i)total[r][p], _mm256_madd_epi16(pairs[r][p], ones));
      }
    }
  }
};
#endif

}  // namespace
}  // namespace narrowcast

#include "linear_lowbit_interleaved_body.h"
