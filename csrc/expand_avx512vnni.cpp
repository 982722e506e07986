#include "stored_weight.h"

#include "expand_body.inc"

namespace narrowcast {

const ExpandKernels expand_avx512vnni = {expand};

}  // namespace narrowcast
