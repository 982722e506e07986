#include "search.h"

#include "search_body.inc"

namespace narrowcast {

const SearchKernels search_avx512vnni = {search};

}  // namespace narrowcast
