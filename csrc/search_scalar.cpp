#include "search.h"

#include "search_body.inc"

namespace narrowcast {

const SearchKernels search_scalar = {search};

}  // namespace narrowcast
