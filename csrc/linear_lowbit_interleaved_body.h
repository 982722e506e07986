// Low-bit linear tile on interleaved weights, for vectors of 32 and 16 bytes. Included after a file has defined its
// vector:
//
//   kVectorBytes, kTileRows      bytes of a vector, rows of the largest register tile
//   look_up(table, index)        16 bytes, the same in every 16 of the table, by the low bits of every byte
//   load_scale(problem, at)      the scales from the at-th on, as floats, as many as a vector holds
//   store(problem, at, n, value) n values of the output from the at-th on
//   Mode<BITS, LEVELS>           whether weights are signed (the zero point subtracted), and how many quads of products
//                                are summed before they are widened to int32
//   ChunkSums<ROWS, Mode>        `add<QUAD>(levels, codes)`, one quad of all parts and rows, and `finish`
//
// Unsigned levels start the sum of a block at minus the zero point times the sum of its codes.
#pragma once

#include "linear_lowbit.h"

#include <string.h>

#include "fused.h"
#include "interleaved.h"
#include "quantize.h"

namespace narrowcast {
namespace {

constexpr int kParts = kUnitBytes / kVectorBytes;      // vectors that hold four bytes of the 16 columns of a panel
constexpr int64_t kLanes = kVectorBytes / 4;           // columns of a part

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline Bytes every_byte(int value) { return Bytes{} + static_cast<int8_t>(value); }

inline Words load_unit(const uint8_t* units, int unit) {
  Words words;
  memcpy(&words, units + unit * kUnitBytes, kVectorBytes);
  return words;
}

// Bits FIRST.. of every byte moved to bit `TO`, with bits of the neighbour beside them.
template <int FIRST, int TO>
inline Bytes moved(Words words) {
  if constexpr (FIRST > TO) return (Bytes)(words >> (FIRST - TO));
  if constexpr (FIRST < TO) return (Bytes)(words << (TO - FIRST));
  return (Bytes)words;
}

// The fields of quad QUAD of a chunk in one part of its columns; `units` points at the part.
template <int BITS, int QUAD>
inline Bytes quad_fields(const uint8_t* units) {
  if constexpr (BITS == 8) return (Bytes)load_unit(units, QUAD);
  constexpr int kLow = BITS >= 4 ? 4 : 2, kHigh = BITS - kLow, kPerUnit = 8 / kLow;
  const Bytes low = moved<QUAD % kPerUnit * kLow, 0>(load_unit(units, QUAD / kPerUnit)) & every_byte((1 << kLow) - 1);
  if constexpr (kHigh == 0) {
    return low;
  } else {
    constexpr int kHighPerUnit = 8 / kHigh;
    const Bytes high = moved<QUAD % kHighPerUnit * kHigh, kLow>(load_unit(units, 8 / kPerUnit + QUAD / kHighPerUnit));
    return low | (high & every_byte(((1 << kHigh) - 1) << kLow));
  }
}

// What the sums multiply: levels, or levels less the zero point.
template <int BITS, bool LEVELS, int QUAD>
inline Bytes quad_weights(const uint8_t* units, Bytes table) {
  const Bytes fields = quad_fields<BITS, QUAD>(units);
  if constexpr (LEVELS) return look_up(table, fields);
  if constexpr (BITS == 8 && !Mode<BITS, LEVELS>::kSigned) return fields ^ every_byte(-128);
  return fields;
}

template <class Mode>
inline Bytes weight_table(const LowBitLinear& problem) {
  Bytes table{};
  for (int i = 0; problem.levels != nullptr && i < kVectorBytes; ++i) {
    table[i] = static_cast<int8_t>(problem.levels[i % 16] - (Mode::kSigned ? problem.zero : 0));
  }
  return table;
}

struct Tile {
  const int8_t* codes;       // first row, signed
  const int32_t* code_sums;  // [row][blocks]
  const float* code_scales;  // [row][blocks]
  const uint8_t* panel;
  int64_t first_group;       // index of the panel's first scale, in units of 16
  float* totals;             // [row][16]
};

// EXPANDED: `units` holds the weights themselves, a byte each, as `expand` wrote them.
template <int ROWS, int BITS, bool LEVELS, bool EXPANDED, int QUAD, class Sums>
inline void add_quads(Sums& sums, const uint8_t* units, const int8_t* const* codes, Bytes table) {
  Bytes weights[kParts];
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const uint8_t* source = units + part * kVectorBytes;
    weights[part] = EXPANDED ? (Bytes)load_unit(source, QUAD) : quad_weights<BITS, LEVELS, QUAD>(source, table);
  }
  sums.template add<QUAD>(weights, codes);
  if constexpr (QUAD < 7) add_quads<ROWS, BITS, LEVELS, EXPANDED, QUAD + 1>(sums, units, codes, table);
}

template <int BITS, bool LEVELS, int QUAD>
inline void expand_quads(const uint8_t* units, Bytes table, uint8_t* target) {
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    const Bytes weights = quad_weights<BITS, LEVELS, QUAD>(units + part * kVectorBytes, table);
    memcpy(target + QUAD * kUnitBytes + part * kVectorBytes, &weights, kVectorBytes);
  }
  if constexpr (QUAD < 7) expand_quads<BITS, LEVELS, QUAD + 1>(units, table, target);
}

// What the sums multiply, of a whole panel: for many rows its fields are brought out of their bytes once.
template <int BITS, bool LEVELS>
void expand(const LowBitLinear& problem, const uint8_t* units, uint8_t* target) {
  const Bytes table = LEVELS ? weight_table<Mode<BITS, LEVELS>>(problem) : Bytes{};
  for (int64_t k = 0; k < problem.depth; k += kChunk, units += BITS * kUnitBytes, target += 8 * kUnitBytes) {
    expand_quads<BITS, LEVELS, 0>(units, table, target);
  }
}

// Where the sums of a block start.
template <class Mode>
inline Int32s start_of(const LowBitLinear& problem, int32_t code_sum, int64_t group, int part) {
  if constexpr (Mode::kSigned) return Int32s{};
  if (problem.zero_point == nullptr) return Int32s{} + code_sum;
  const uint8_t* source = problem.zero_point + group * 16 + part * kLanes;
  Int32s zero_point;
  const int32_t mask = (1 << problem.bits) - 1;
  for (int lane = 0; lane < kLanes; ++lane) zero_point[lane] = source[lane] & mask;
  return zero_point * code_sum;
}

template <int ROWS, int BITS, bool LEVELS, bool EXPANDED>
__attribute__((noinline)) void tile_rows(const LowBitLinear& problem, const Tile& tile) {
  using ThisMode = Mode<BITS, LEVELS>;
  constexpr int kUnits = EXPANDED ? 8 : BITS;
  const Bytes table = LEVELS && !EXPANDED ? weight_table<ThisMode>(problem) : Bytes{};
  const int64_t block_chunks = problem.block / kChunk, blocks = problem.blocks;
  const uint8_t* units = tile.panel;
  const int8_t* codes = tile.codes;
  int64_t group = tile.first_group, left_in_group = problem.blocks_per_group;
  int64_t chunks_left = (problem.depth + kChunk - 1) / kChunk;
  memset(tile.totals, 0, ROWS * 16 * sizeof(float));
  for (int64_t block = 0; block < blocks; ++block) {
    ChunkSums<ROWS, ThisMode> sums;
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int p = 0; p < kParts; ++p) {
        sums.total[r][p] = start_of<ThisMode>(problem, tile.code_sums[r * blocks + block], group, p);
      }
    }
    const int64_t chunks = smaller(block_chunks, chunks_left);
    chunks_left -= chunks;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, units += kUnits * kUnitBytes, codes += kChunk) {
      const int8_t* rows[ROWS];
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        rows[r] = codes + r * problem.code_stride;
        asm("" : "+r"(rows[r]));  // else the compiler keeps a pointer for every row and quad
      }
      if (ROWS <= 2) {
#pragma GCC unroll 8
        for (int u = 0; u < kUnits; ++u) __builtin_prefetch(units + u * kUnitBytes + 1024);
      }
      add_quads<ROWS, BITS, LEVELS, EXPANDED, 0>(sums, units, rows, table);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Floats scale = load_scale(problem, group * 16 + p * kLanes) * problem.level_scale;
#pragma GCC unroll 6
      for (int r = 0; r < ROWS; ++r) {
        const Floats scaled = __builtin_convertvector(sums.total[r][p], Floats) * scale;
        Floats total;
        float* target = tile.totals + r * 16 + p * kLanes;
        memcpy(&total, target, kVectorBytes);
        total += scaled * tile.code_scales[r * blocks + block];
        memcpy(target, &total, kVectorBytes);
      }
    }
    if (--left_in_group == 0) ++group, left_in_group = problem.blocks_per_group;
  }
}

using Kernel = void (*)(const LowBitLinear&, const Tile&);

template <int BITS, bool LEVELS, bool EXPANDED, int ROWS>
constexpr Kernel kernel_of(int64_t rows) {
  if (rows == ROWS) return tile_rows<ROWS, BITS, LEVELS, EXPANDED>;
  if constexpr (ROWS < kTileRows) return kernel_of<BITS, LEVELS, EXPANDED, ROWS + 1>(rows);
  return nullptr;
}

// The bodies of one format; `kernel` takes a number of rows.
struct Bodies {
  Kernel (*kernel)(int64_t rows);
  Kernel (*expanded_kernel)(int64_t rows);
  void (*expand)(const LowBitLinear& problem, const uint8_t* units, uint8_t* target);
};

template <int BITS, bool LEVELS = false>
constexpr Bodies kBodies = {kernel_of<BITS, LEVELS, false, 1>, kernel_of<BITS, LEVELS, true, 1>, expand<BITS, LEVELS>};

const Bodies& find_bodies(const LowBitLinear& problem) {
  switch (problem.bits) {
    case 2: return kBodies<2>;
    case 3: return kBodies<3>;
    case 4: return problem.levels != nullptr ? kBodies<4, true> : kBodies<4>;
    case 5: return kBodies<5>;
    case 6: return kBodies<6>;
    default: return kBodies<8>;
  }
}

void finish(const LowBitLinear& problem, int64_t row, int64_t row_count, Range columns, const float* totals) {
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t column = columns.begin; column < columns.end; column += kLanes) {
      const int64_t count = smaller(kLanes, columns.end - column);
      Floats value, bias{};
      memcpy(&value, totals + r * 16 + (column - columns.begin), kVectorBytes);
      if (problem.bias != nullptr) {
        memcpy(&bias, problem.bias + column, static_cast<size_t>(4 * count));
        value += bias;
      }
      store(problem, (row + r) * problem.out_stride + column, count, fuse<Floats, Int32s>(problem.fused, value));
    }
  }
}

// From this many register tiles of rows on a panel is expanded first.
constexpr int64_t kTilesToExpand = 4;

int64_t interleaved_scratch(const LowBitLinear& problem) {
  return (problem.depth + kChunk - 1) / kChunk * 8 * kUnitBytes;
}

void interleaved_tile(const LowBitLinear& problem, Range rows, Range columns, void* scratch) {
  const Bodies& bodies = find_bodies(problem);
  const int64_t panel_bytes = Interleaved{0, problem.depth, problem.bits}.panel_bytes();
  const int64_t total = rows.end - rows.begin, steps = (total + kTileRows - 1) / kTileRows;
  const bool expanded = steps >= kTilesToExpand;
  auto* weights = static_cast<uint8_t*>(scratch);
  alignas(64) float totals[kTileRows * 16];
  for (int64_t column = columns.begin; column < columns.end; column += 16) {
    const uint8_t* panel = problem.weight + column / 16 * panel_bytes;
    if (expanded) bodies.expand(problem, panel, weights);
    int64_t row = rows.begin;
    for (int64_t step = 0; step < steps; ++step) {  // rows shared out evenly: 7 = 4 + 3
      const int64_t count = total / steps + (step < total % steps ? 1 : 0);
      const Tile tile = {reinterpret_cast<const int8_t*>(problem.codes) + row * problem.code_stride,
                         problem.code_sums + row * problem.blocks,
                         problem.code_scales + row * problem.blocks,
                         expanded ? weights : panel,
                         column / 16 * problem.groups,
                         totals};
      (expanded ? bodies.expanded_kernel : bodies.kernel)(count)(problem, tile);
      finish(problem, row, count, {column, smaller(column + 16, columns.end)}, totals);
      row += count;
    }
  }
}

// See LowBitKernels: a row by the tier's own quantizer, then the sums.
bool interleaved_row(const LowBitLinear& problem, const void* x, FloatType type, int64_t input_group, uint8_t* codes,
                     float* scales, int32_t* sums) {
  const QuantizeKernels& kernels = kQuantizeTiers.active();
  const int64_t depth = problem.depth, padded = (depth + kChunk - 1) / kChunk * kChunk;
  if (input_group == kActivationGroup && problem.block == kActivationGroup) {
    if (!kernels.to_uint8_groups(x, type, depth, codes, scales)) return false;
  } else {
    memset(codes + depth, 128, static_cast<size_t>(padded - depth));
    for (int64_t begin = 0; begin < depth; begin += input_group) {
      const int64_t count = smaller(input_group, depth - begin);
      const void* part = static_cast<const char*>(x) + begin * float_bytes(type);
      const uint32_t bits = kernels.absmax_bits(part, type, count);
      if (bits >= kNonFiniteBits) return false;
      const bool zero = bits < kSmallestRangeBits;
      kernels.to_uint8(part, type, count, zero ? 0.0f : 127.0f / bits_to_float(bits), 128, codes + begin);
      const float scale = zero ? 1.0f : bits_to_float(bits) / 127.0f;
      for (int64_t block = begin / problem.block; block * problem.block < begin + count; ++block) scales[block] = scale;
    }
  }
  const int32_t factor = problem.zero_point != nullptr ? -1 : -static_cast<int32_t>(problem.zero);
  for (int64_t block = 0; block < problem.blocks; ++block) {
    int32_t sum = 0;
    const int64_t end = smaller((block + 1) * problem.block, padded);
    for (int64_t k = block * problem.block; k < end; ++k) {
      codes[k] = static_cast<uint8_t>(codes[k] ^ 128);
      sum += static_cast<int8_t>(codes[k]);
    }
    sums[block] = factor * sum;
  }
  return true;
}

}  // namespace
}  // namespace narrowcast
