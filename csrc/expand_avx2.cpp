#include "stored_weight.h"

#include "expand_body.inc"

namespace narrowcast {

const ExpandKernels expand_avx2 = {expand};

}  // namespace narrowcast
