// Weight-only dequantization: stored codes to float32 rows.
#pragma once

#include "kernels.h"

namespace narrowcast {

struct DequantizeKernels {
  // out[column] = codes[column] * scale for one row.
  void (*int8_row)(const int8_t* codes, float scale, int64_t columns, float* out);
};

extern const DequantizeKernels dequantize_scalar;
extern const DequantizeKernels dequantize_avx2;
extern const DequantizeKernels dequantize_avx512vnni;

}  // namespace narrowcast
