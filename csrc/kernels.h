// What every kernel file shares: the instruction-set tiers and the element types. Free of torch and of the C++
// library, so that translation units compiled for a newer instruction set cannot leak inline functions.
#pragma once

#include <stdint.h>

namespace narrowcast {

enum class Isa : int { scalar = 0, avx2 = 1, avx512vnni = 2 };
constexpr int kIsaCount = 3;

enum class FloatType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// The tier in use: the best one this CPU and operating system have, unless NARROWCAST_ISA or set_isa chose another.
Isa active_isa();

// Whether the CPU has AVX-512 BF16, which kernels for float inputs use beside the AVX-512 VNNI tier.
bool has_avx512bf16();

// One tensor family's kernels, chosen by tier; a tier without its own body names the next lower one.
template <class Table>
struct Tiers {
  const Table* tier[kIsaCount];
  const Table& active() const { return *tier[static_cast<int>(active_isa())]; }
};

}  // namespace narrowcast
