#include "linear_int8_body_256.h"

namespace narrowcast {

void int8_tile_avxvnni(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  int8_tile(problem, rows, columns, scratch);
}

int64_t int8_scratch_avxvnni(int64_t depth) { return int8_scratch(depth); }

}  // namespace narrowcast
