#include "dequantize.h"

#include "dequantize_body.inc"

namespace narrowcast {

const DequantizeKernels dequantize_avx512vnni = {int8_row, int4_row};

}  // namespace narrowcast
