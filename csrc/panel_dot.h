// Dot products of input rows and panel rows, tiled in registers. Included after a file has defined its vector:
// Vector, kPanelLanes (elements per vector of 64 or fewer bytes), kTileRows, kTileColumns, panel_load, panel_multiply_add,
// panel_sum and, where a tile has four rows, panel_sum4.
#pragma once

#include <string.h>

#include "weight_only.h"

namespace narrowcast {
namespace {

template <int kRows>
__attribute__((noinline)) void panel_tile(const char* x, const char* panel, int64_t stride, int64_t depth,
                                          float* sums) {
  Vector total[kRows][kTileColumns];
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 8
    for (int column = 0; column < kTileColumns; ++column) total[row][column] = Vector{};
  }
  for (int64_t at = 0; at < depth; at += kVectorBytes) {
    Vector left[kRows];
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) left[row] = panel_load(x + row * stride + at);
#pragma GCC unroll 8
    for (int column = 0; column < kTileColumns; ++column) {
      const Vector right = panel_load(panel + column * stride + at);
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) total[row][column] = panel_multiply_add(left[row], right, total[row][column]);
    }
  }
#pragma GCC unroll 8
  for (int column = 0; column < kTileColumns; ++column) {
    if constexpr (kRows == 4) {  // four sums at once take half the shuffles
      float four[4];
      panel_sum4(total[0][column], total[1][column], total[2][column], total[3][column], four);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) sums[row * kPanelColumns + column] += four[row];
    } else {
#pragma GCC unroll 8
      for (int row = 0; row < kRows; ++row) sums[row * kPanelColumns + column] += panel_sum(total[row][column]);
    }
  }
}

void dot_panel(const void* x, int64_t rows, const void* panel, int64_t columns, int64_t depth, float* sums) {
  constexpr int64_t stride = kPanelBytes + kPanelPad;
  for (int64_t column = 0; column < columns; column += kTileColumns) {
    const char* right = static_cast<const char*>(panel) + column * stride;
    const auto* left = static_cast<const char*>(x);
    float* target = sums + column;
    int64_t row = 0;
    for (; row + kTileRows <= rows; row += kTileRows) {
      panel_tile<kTileRows>(left + row * stride, right, stride, depth, target + row * kPanelColumns);
    }
    left += row * stride, target += row * kPanelColumns;
    switch (rows - row) {
      case 1: panel_tile<1>(left, right, stride, depth, target); break;
      case 2: panel_tile<2>(left, right, stride, depth, target); break;
      case 3: panel_tile<3>(left, right, stride, depth, target); break;
      default: break;
    }
  }
}

}  // namespace
}  // namespace narrowcast
