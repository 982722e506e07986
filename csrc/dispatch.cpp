// Which instruction-set tier runs: decided once from the CPU and NARROWCAST_ISA, changeable by tests.
// The C functions below are called from Python through ctypes.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace narrowcast {
namespace {

constexpr const char* kIsaNames[kIsaCount] = {"scalar", "avx2", "avx512vnni"};

// Empty when the tier can run here, else the first missing part.
const char* missing_for(Isa isa) {
  if (isa == Isa::scalar) return "";
#if NARROWCAST_X86
  __builtin_cpu_init();  // looks at XGETBV too: the operating system must save the registers
  if (!__builtin_cpu_supports("avx2")) return "the CPU has no AVX2";
  if (!__builtin_cpu_supports("fma")) return "the CPU has no FMA";
  if (!__builtin_cpu_supports("f16c")) return "the CPU has no F16C";
  if (isa == Isa::avx2) return "";
  if (!__builtin_cpu_supports("avx512f")) return "the CPU has no AVX-512";
  if (!__builtin_cpu_supports("avx512bw")) return "the CPU has no AVX-512 BW";
  if (!__builtin_cpu_supports("avx512dq")) return "the CPU has no AVX-512 DQ";
  if (!__builtin_cpu_supports("avx512vl")) return "the CPU has no AVX-512 VL";
  if (!__builtin_cpu_supports("avx512vnni")) return "the CPU has no AVX-512 VNNI";
  return "";
#else
  return "the library was built for another processor family";
#endif
}

int find_isa(const char* name) {
  for (int index = 0; index < kIsaCount; ++index) {
    if (std::strcmp(name, kIsaNames[index]) == 0) return index;
  }
  return -1;
}

int initial_isa() {
  // An unknown or unavailable NARROWCAST_ISA is reported by Python before any op runs; here it is only not obeyed.
  const char* forced = std::getenv("NARROWCAST_ISA");
  if (forced != nullptr) {
    const int index = find_isa(forced);
    if (index >= 0 && missing_for(static_cast<Isa>(index))[0] == '\0') return index;
  }
  int best = 0;
  for (int index = 1; index < kIsaCount; ++index) {
    if (missing_for(static_cast<Isa>(index))[0] == '\0') best = index;
  }
  return best;
}

std::atomic<int>& current_isa() {
  static std::atomic<int> isa{initial_isa()};
  return isa;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(current_isa().load(std::memory_order_relaxed)); }

bool has_avx512bf16() {
#if NARROWCAST_X86
  static const bool found = __builtin_cpu_supports("avx512bf16");
  return found;
#else
  return false;
#endif
}

}  // namespace narrowcast

#if defined(_WIN32)
#define NARROWCAST_EXPORT extern "C" __declspec(dllexport)
#else
#define NARROWCAST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Name of the tier in use.
NARROWCAST_EXPORT const char* narrowcast_isa() {
  return narrowcast::kIsaNames[static_cast<int>(narrowcast::active_isa())];
}

// Why a tier cannot run here: "" when it can, null when there is no tier of that name.
NARROWCAST_EXPORT const char* narrowcast_isa_missing(const char* name) {
  const int index = narrowcast::find_isa(name);
  return index < 0 ? nullptr : narrowcast::missing_for(static_cast<narrowcast::Isa>(index));
}

// Switches the tier of the whole process; 0 on success, 1 when the tier is unknown or cannot run here.
NARROWCAST_EXPORT int narrowcast_set_isa(const char* name) {
  const char* missing = narrowcast_isa_missing(name);
  if (missing == nullptr || missing[0] != '\0') return 1;
  narrowcast::current_isa().store(narrowcast::find_isa(name), std::memory_order_relaxed);
  return 0;
}
