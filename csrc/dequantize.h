// Weight-only dequantization: stored codes to float32 rows.
#pragma once

#include "kernels.h"

namespace narrowcast {

struct DequantizeKernels {
  // out[column] = (codes[column] - zero_point) * scale for one row.
  void (*int8_row)(const int8_t* codes, float scale, int32_t zero_point, int64_t columns, float* out);

  // out[column] = (nibble - zero_point[g]) * scale[g], g = column / group, for one packed row; the scales are float16,
  // zero_point may be null for 8, and group is even unless it is the whole row.
  void (*int4_row)(const uint8_t* packed, const uint16_t* scale, const uint8_t* zero_point, int64_t group,
                   int64_t columns, float* out);
};

extern const DequantizeKernels dequantize_scalar;
extern const DequantizeKernels dequantize_avx2;
extern const DequantizeKernels dequantize_avx512vnni;

constexpr Tiers<DequantizeKernels> kDequantizeTiers = {
    .scalar = &dequantize_scalar,
    .avx2 = NARROWCAST_X86_BODY(dequantize_avx2),
    .avx512vnni = NARROWCAST_X86_BODY(dequantize_avx512vnni),
};

}  // namespace narrowcast
