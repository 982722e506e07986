#include "linear_int8_interleaved_body_256.h"

namespace narrowcast {

void int8_interleaved_avxvnni(const Int8Linear& problem, Range rows, Range columns, void* scratch) {
  int8_interleaved(problem, rows, columns, scratch);
}

}  // namespace narrowcast
