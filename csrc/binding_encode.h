// What the bindings that choose scales share.
#pragma once

#include "binding.h"
#include "encode.h"

namespace narrowcast {

// The codes of a signed format of `bits` bits; raises for widths and scale formats that do not exist.
CodeBounds code_range(int64_t bits, bool symmetric, int64_t scale_format, const char* op);

}  // namespace narrowcast
