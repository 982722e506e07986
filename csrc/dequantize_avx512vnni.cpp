#include "dequantize.h"

#include "dequantize_body.inc"

namespace narrowcast {

const DequantizeKernels dequantize_avx512vnni = {int8_row};

}  // namespace narrowcast
