#include "dequantize.h"

#include "dequantize_body.inc"

namespace narrowcast {

const DequantizeKernels dequantize_scalar = {int8_row, int4_row};

}  // namespace narrowcast
