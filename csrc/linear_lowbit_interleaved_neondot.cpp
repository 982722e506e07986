// The NEON vectors of linear_lowbit_interleaved_body.h: SDOT multiplies signed bytes, so levels above 127 (int8, nf4) are
// taken less their zero point.
#include "linear_lowbit.h"

#include "interleaved.h"
#include "simd_neon.h"

namespace narrowcast {
namespace {

typedef int8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Words __attribute__((vector_size(16)));
typedef int32_t Int32s __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;

inline Bytes look_up(Bytes table, Bytes index) { return (Bytes)vqtbl1q_s8((int8x16_t)table, (uint8x16_t)index); }

inline Floats load_scale(const LowBitLinear& problem, int64_t at) {
  return (Floats)(problem.scale_is_half ? load4<FloatType::float16>(problem.scale, at)
                                        : load4<FloatType::float32>(problem.scale, at));
}

inline void store(const LowBitLinear& problem, int64_t at, int64_t count, Floats value) {
  store4(problem.out, problem.out_type, at, count, (float32x4_t)value);
}

template <int BITS, bool LEVELS>
struct Mode {
  static constexpr bool kSigned = BITS == 8 || LEVELS;
};

template <int ROWS, class Mode>
struct ChunkSums {
  Int32s total[ROWS][4];

  template <int QUAD>
  inline void add(const Bytes* weights, const int8_t* const* codes) {
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      __builtin_memcpy(&four, codes[r] + 4 * QUAD, 4);
      const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
      for (int p = 0; p < 4; ++p) {
        total[r][p] = (Int32s)vdotq_s32((int32x4_t)total[r][p], (int8x16_t)weights[p], a);
      }
    }
  }
};

}  // namespace
}  // namespace narrowcast

#include "linear_lowbit_interleaved_body.h"

namespace narrowcast {

const InterleavedKernels lowbit_interleaved_neondot = {interleaved_row, interleaved_tile, interleaved_scratch};

}  // namespace narrowcast
