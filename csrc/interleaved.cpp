#include "interleaved.h"

#include <string.h>

namespace narrowcast {
namespace {

constexpr int64_t low_plane(int64_t bits) { return bits == 8 ? 8 : bits >= 4 ? 4 : 2; }

// The field of code k in the 4-byte column of one row; `unit` points at that row's bytes of the chunk's first unit.
int field_of(const uint8_t* unit, int64_t bits, int64_t k) {
  int field = 0;
  int64_t shift = 0, first = 0;
  for (int64_t plane = low_plane(bits); shift < bits; plane = bits - shift) {
    const int64_t per_unit = 8 / plane, quad = k / 4;
    const int byte = unit[(first + quad / per_unit) * kUnitBytes + k % 4];
    field |= (byte >> (quad % per_unit * plane) & ((1 << plane) - 1)) << shift;
    first += 8 / per_unit, shift += plane;
  }
  return field;
}

}  // namespace

void restore_rows(const Interleaved& layout, const uint8_t* interleaved, uint8_t* stored) {
  const int64_t row_bytes = (layout.columns * layout.bits + 7) / 8;
  memset(stored, 0, static_cast<size_t>(layout.rows * row_bytes));
  for (int64_t row = 0; row < layout.rows; ++row, stored += row_bytes) {
    const uint8_t* panel = interleaved + row / kInterleavedRows * layout.panel_bytes() + row % kInterleavedRows * 4;
    for (int64_t k = 0; k < layout.columns; ++k) {
      const int field = field_of(panel + k / kChunk * layout.bits * kUnitBytes, layout.bits, k % kChunk);
      const int64_t bit = k * layout.bits;
      stored[bit / 8] = static_cast<uint8_t>(stored[bit / 8] | field << bit % 8);
      if (bit % 8 + layout.bits > 8) stored[bit / 8 + 1] = static_cast<uint8_t>(field >> (8 - bit % 8));
    }
  }
}

void restore_groups(int64_t rows, int64_t groups, int64_t bytes, const void* interleaved, void* stored) {
  const auto* source = static_cast<const char*>(interleaved);
  auto* target = static_cast<char*>(stored);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t group = 0; group < groups; ++group, target += bytes) {
      const int64_t index = (row / kInterleavedRows * groups + group) * kInterleavedRows + row % kInterleavedRows;
      memcpy(target, source + index * bytes, static_cast<size_t>(bytes));
    }
  }
}

}  // namespace narrowcast
