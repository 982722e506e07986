// Activation codes for low-bit linear layers on interleaved weights, AVX-512: signed codes, the scales of their groups
// and the sums of their blocks. Groups are found and scaled sixteen at a time; a group alone would spend most of its
// time in the reduction and the division.
#include "linear_lowbit_avx512.h"

#include "float_types.h"
#include "interleaved.h"
#include "quantize.h"
#include "simd_avx512.h"
#include "transpose_avx512.h"

namespace narrowcast {
namespace {

constexpr int64_t kMostChunks = 65536 / kChunk + 16;

// 16 values, zeros behind the end. Masks cost more than the branch.
template <FloatType type>
inline __m512 values16(const void* x, int64_t at, int64_t count) {
  return at + 16 <= count ? load16<type>(x, at, 0xffff) : load16<type>(x, at, lanes16(count - at));
}

// The largest magnitude of every chunk of 32, as bits; whole sixteens of chunks are written, 0 behind the end.
template <FloatType type>
void chunk_maxima(const void* x, int64_t count, uint32_t* maxima) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int64_t start = 0; start < count; start += 16 * kChunk, maxima += 16) {
    __m512i largest[16];
#pragma GCC unroll 16
    for (int c = 0; c < 16; ++c) {
      const int64_t at = start + c * kChunk;
      if (at >= count) {
        largest[c] = _mm512_setzero_si512();
        continue;
      }
      const __m512i low = _mm512_castps_si512(values16<type>(x, at, count));
      const __m512i high = _mm512_castps_si512(values16<type>(x, at + 16, count));
      largest[c] = _mm512_max_epi32(_mm512_and_si512(low, magnitude), _mm512_and_si512(high, magnitude));
    }
    _mm512_storeu_si512(maxima, max_lanes(largest));
  }
}

// Scales and their inverses of `count` groups; false when one of them holds a value that is not finite.
bool group_scales(const uint32_t* maxima, int64_t count, float* scales, float* inverses) {
  const __m512 most = _mm512_set1_ps(127.0f);
  __mmask16 bad = 0;
  for (int64_t group = 0; group < count; group += 16) {
    const __mmask16 mask = lanes16(count - group);
    const __m512i bits = _mm512_maskz_loadu_epi32(mask, maxima + group);
    bad |= _mm512_cmpge_epi32_mask(bits, _mm512_set1_epi32(kNonFiniteBits));
    const __mmask16 zero = _mm512_cmplt_epi32_mask(bits, _mm512_set1_epi32(kSmallestRangeBits));
    const __m512 range = _mm512_castsi512_ps(bits);
    const __m512 scale = _mm512_mask_mov_ps(_mm512_div_ps(range, most), zero, _mm512_set1_ps(1.0f));
    _mm512_mask_storeu_ps(scales + group, mask, scale);
    _mm512_mask_storeu_ps(inverses + group, mask, _mm512_maskz_div_ps(static_cast<__mmask16>(~zero), most, range));
  }
  return bad == 0;
}

// Signed codes of all chunks, by pairs of chunks, and the sum of each chunk.
template <FloatType type>
void write_codes(const void* x, int64_t count, const float* inverses, int64_t chunks_per_inverse, int8_t* codes,
                 int32_t* sums) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i ones = _mm512_set1_epi8(1);
  int64_t left = chunks_per_inverse;
  for (int64_t start = 0; start < count; start += 2 * kChunk, codes += 2 * kChunk, sums += 2) {
    __m512i steps[4];
#pragma GCC unroll 2
    for (int chunk = 0; chunk < 2; ++chunk) {
      const __m512 inverse = _mm512_set1_ps(*inverses);
      if (--left == 0) ++inverses, left = chunks_per_inverse;
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t at = start + chunk * kChunk + half * 16;
        const __m512 value = values16<type>(x, at, count);
        steps[2 * chunk + half] = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
      }
    }
    const __m512i packed = _mm512_permutexvar_epi32(
        order, _mm512_packs_epi16(_mm512_packs_epi32(steps[0], steps[1]), _mm512_packs_epi32(steps[2], steps[3])));
    _mm512_storeu_si512(codes, packed);
    // eight sums of four in each half
    const __m512i fours = _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, packed);
    __m256i pair = _mm256_hadd_epi32(_mm512_castsi512_si256(fours), _mm512_extracti64x4_epi64(fours, 1));
    pair = _mm256_hadd_epi32(pair, pair);
    const __m128i both = _mm_add_epi32(_mm256_castsi256_si128(pair), _mm256_extracti128_si256(pair, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(sums), both);
  }
}

template <FloatType type>
bool quantize_row(const LowBitLinear& problem, const void* x, int64_t input_group, uint8_t* codes, float* scales,
                  int32_t* sums) {
  const int64_t depth = problem.depth, chunks = (depth + kChunk - 1) / kChunk;
  const int64_t chunks_per_group = input_group / kChunk, groups = (chunks + chunks_per_group - 1) / chunks_per_group;
  uint32_t maxima[kMostChunks];
  float group_scale[kMostChunks], inverses[kMostChunks + 2];
  int32_t chunk_sums[kMostChunks];
  chunk_maxima<type>(x, depth, maxima);
  for (int64_t group = 0; chunks_per_group > 1 && group < groups; ++group) {
    uint32_t most = 0;
    const int64_t end = (group + 1) * chunks_per_group < chunks ? (group + 1) * chunks_per_group : chunks;
    for (int64_t chunk = group * chunks_per_group; chunk < end; ++chunk) {
      most = maxima[chunk] > most ? maxima[chunk] : most;
    }
    maxima[group] = most;
  }
  if (!group_scales(maxima, groups, group_scale, inverses)) return false;
  inverses[groups] = 0.0f;  // of the chunk that fills the last pair
  write_codes<type>(x, depth, inverses, chunks_per_group, reinterpret_cast<int8_t*>(codes), chunk_sums);
  const int64_t chunks_per_block = problem.block / kChunk, blocks_per_group = input_group / problem.block;
  const int32_t factor = problem.zero_point != nullptr ? -1 : -static_cast<int32_t>(problem.zero);
  for (int64_t block = 0, group = 0, left = blocks_per_group; block < problem.blocks; ++block) {
    int32_t sum = 0;
    const int64_t end = (block + 1) * chunks_per_block < chunks ? (block + 1) * chunks_per_block : chunks;
    for (int64_t chunk = block * chunks_per_block; chunk < end; ++chunk) sum += chunk_sums[chunk];
    sums[block] = factor * sum, scales[block] = group_scale[group];
    if (--left == 0) ++group, left = blocks_per_group;
  }
  return true;
}

}  // namespace

bool lowbit_codes_avx512vnni(const LowBitLinear& problem, const void* x, FloatType type, int64_t input_group,
                             uint8_t* codes, float* scales, int32_t* sums) {
  switch (type) {
    case FloatType::float32: return quantize_row<FloatType::float32>(problem, x, input_group, codes, scales, sums);
    case FloatType::bfloat16: return quantize_row<FloatType::bfloat16>(problem, x, input_group, codes, scales, sums);
    default: return quantize_row<FloatType::float16>(problem, x, input_group, codes, scales, sums);
  }
}

}  // namespace narrowcast
