// The layout of weights in memory that vector kernels read best: 16 rows side by side, four codes of each at a time.
//
// A matrix of [rows, columns] codes of `bits` bits is [panels][chunks][bits][16][4] bytes: a panel is 16 rows, a chunk
// 32 codes of each, and what a chunk takes is one 64-byte unit per bit. Rows and codes that do not exist are fields 0.
// Quad q of a chunk is its codes 4 q .. 4 q + 3. The bits of a field are split into planes, the lowest first:
//   8 bits: one plane of 8     6 bits: 4 and 2     5 bits: 4 and 1     4 bits: 4     3 bits: 2 and 1     2 bits: 2
// and unit u of a plane of w bits holds quads u * 8 / w + i, the i-th shifted to the left by w * i bits in its bytes.
// Scales and zero points of groups are [panels][groups][16].
#pragma once

#include <stdint.h>

namespace narrowcast {

constexpr int64_t kInterleavedRows = 16;
constexpr int64_t kChunk = 32;
constexpr int64_t kUnitBytes = 64;

struct Interleaved {
  int64_t rows, columns, bits;

  constexpr int64_t panels() const { return (rows + kInterleavedRows - 1) / kInterleavedRows; }
  constexpr int64_t chunks() const { return (columns + kChunk - 1) / kChunk; }
  constexpr int64_t panel_bytes() const { return chunks() * bits * kUnitBytes; }
};

// Copies interleaved codes back into rows of ceil(columns * bits / 8) bytes, a little-endian stream of fields. Plain
// loops, for tiers that have no kernel for the interleaved layout.
void restore_rows(const Interleaved& layout, const uint8_t* interleaved, uint8_t* stored);

// The same for [panels][groups][16] values of `bytes` bytes each, back into [rows][groups].
void restore_groups(int64_t rows, int64_t groups, int64_t bytes, const void* interleaved, void* stored);

}  // namespace narrowcast
