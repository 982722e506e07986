#include "linear_lowbit_interleaved_body_256.h"

namespace narrowcast {

const InterleavedKernels lowbit_interleaved_avxvnni_evex = {interleaved_row, interleaved_tile, interleaved_scratch};

}  // namespace narrowcast
