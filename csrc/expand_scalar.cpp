#include "stored_weight.h"

#include "expand_body.inc"

namespace narrowcast {

const ExpandKernels expand_scalar = {expand};

}  // namespace narrowcast
