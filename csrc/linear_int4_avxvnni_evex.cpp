#include "linear_int4_body_256.h"

namespace narrowcast {

void int4_tile_avxvnni_evex(const Int4Linear& problem, Range rows, Range columns, void* scratch) {
  int4_tile(problem, rows, columns, scratch);
}

int64_t int4_scratch_avxvnni_evex(int64_t depth) { return int4_scratch(depth); }

}  // namespace narrowcast
