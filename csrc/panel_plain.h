// What a tier without a kernel for few rows of its own puts into its table, and float32 panels.
#pragma once

#include <string.h>

#include "weight_only.h"

namespace narrowcast {
namespace {

void to_float_panel(const float* values, int64_t count, int64_t depth, void* panel) {
  memcpy(panel, values, static_cast<size_t>(count * 4));
  memset(static_cast<char*>(panel) + count * 4, 0, static_cast<size_t>(depth - count * 4));
}

}  // namespace
}  // namespace narrowcast
