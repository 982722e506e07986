// What every kernel file shares: the instruction-set tiers and the element types. Free of torch and of the C++
// library, so that translation units compiled for a newer instruction set cannot leak inline functions.
#pragma once

#include <stdint.h>

namespace narrowcast {

// `avxvnni_evex` is the tier "avxvnni" on a CPU that has its instructions only in the encoding of AVX-512: the same
// bodies, compiled a second time.
enum class Isa : int { scalar, avx2, avxvnni_evex, avxvnni, avx512vnni, neondot, neoni8mm };
constexpr int kIsaCount = 7;

// The tier whose bodies also run on a CPU of this tier, one step down in its processor family.
constexpr Isa next_lower(Isa isa) {
  switch (isa) {
    case Isa::avx512vnni: return Isa::avxvnni_evex;
    case Isa::avxvnni:
    case Isa::avxvnni_evex: return Isa::avx2;
    case Isa::neoni8mm: return Isa::neondot;
    default: return Isa::scalar;
  }
}

enum class FloatType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// The tier in use: the best one this CPU and operating system have, unless NARROWCAST_ISA or set_isa chose another.
Isa active_isa();

// Whether the CPU has AVX-512 BF16, which kernels for float inputs use beside the AVX-512 VNNI tier.
bool has_avx512bf16();

// A kernel table that exists only in a library for that processor family, else null.
#if NARROWCAST_X86
#define NARROWCAST_X86_BODY(table) &table
#else
#define NARROWCAST_X86_BODY(table) nullptr
#endif
#if NARROWCAST_ARM
#define NARROWCAST_ARM_BODY(table) &table
#else
#define NARROWCAST_ARM_BODY(table) nullptr
#endif

// One family of kernels by tier; where a tier has no body of its own (null), the next lower one runs.
template <class Table>
struct Tiers {
  const Table* scalar;
  const Table* avx2 = nullptr;
  const Table* avxvnni_evex = nullptr;
  const Table* avxvnni = nullptr;
  const Table* avx512vnni = nullptr;
  const Table* neondot = nullptr;
  const Table* neoni8mm = nullptr;

  constexpr const Table* own_body(Isa isa) const {
    switch (isa) {
      case Isa::avx2: return avx2;
      case Isa::avxvnni_evex: return avxvnni_evex;
      case Isa::avxvnni: return avxvnni;
      case Isa::avx512vnni: return avx512vnni;
      case Isa::neondot: return neondot;
      case Isa::neoni8mm: return neoni8mm;
      default: return scalar;
    }
  }

  constexpr const Table& body(Isa isa) const {
    while (own_body(isa) == nullptr) isa = next_lower(isa);
    return *own_body(isa);
  }

  const Table& active() const { return body(active_isa()); }
};

}  // namespace narrowcast
