// Which instruction-set tier runs: decided once from the CPU and NARROWCAST_ISA, changeable by tests.
// The C functions below are called from Python through ctypes.
#include <atomic>
#include <cstdlib>
#include <cstring>

#if NARROWCAST_ARM && defined(__linux__)
#include <sys/auxv.h>
#elif NARROWCAST_ARM && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"

namespace narrowcast {
namespace {

#if NARROWCAST_ARM && defined(__linux__)
// Bits of the kernel's interface, HWCAP_ASIMDDP and HWCAP2_I8MM: older headers lack the names.
bool has_dot_product() { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }
bool has_int8_matmul() { return (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }
#elif NARROWCAST_ARM && defined(__APPLE__)
bool system_says(const char* name) {
  int value = 0;
  size_t bytes = sizeof value;
  return sysctlbyname(name, &value, &bytes, nullptr, 0) == 0 && value != 0;
}
bool has_dot_product() { return system_says("hw.optional.arm.FEAT_DotProd"); }
bool has_int8_matmul() { return system_says("hw.optional.arm.FEAT_I8MM"); }
#elif NARROWCAST_ARM
bool has_dot_product() { return false; }
bool has_int8_matmul() { return false; }
#endif

// The name stands for both encodings of AVX-VNNI: find_isa chooses the one this CPU has.
constexpr const char* kIsaNames[kIsaCount] = {"scalar",     "avx2",    "avxvnni", "avxvnni",
                                              "avx512vnni", "neondot", "neoni8mm"};

// missing_for: empty when the tier can run here, else the first missing part.
#if NARROWCAST_X86

const char* missing_for(Isa isa) {
  if (isa == Isa::scalar) return "";
  if (isa == Isa::neondot || isa == Isa::neoni8mm) return "it is for Arm processors, and this is an x86 processor";
  __builtin_cpu_init();  // looks at XGETBV too: the operating system must save the registers
  if (!__builtin_cpu_supports("avx2")) return "the CPU has no AVX2";
  if (!__builtin_cpu_supports("fma")) return "the CPU has no FMA";
  if (!__builtin_cpu_supports("f16c")) return "the CPU has no F16C";
  if (isa == Isa::avx2) return "";
  if (isa == Isa::avxvnni) return __builtin_cpu_supports("avxvnni") ? "" : "the CPU has no AVX-VNNI";
  if (!__builtin_cpu_supports("avx512f")) return "the CPU has no AVX-512";
  if (!__builtin_cpu_supports("avx512bw")) return "the CPU has no AVX-512 BW";
  if (!__builtin_cpu_supports("avx512dq")) return "the CPU has no AVX-512 DQ";
  if (!__builtin_cpu_supports("avx512vl")) return "the CPU has no AVX-512 VL";
  if (!__builtin_cpu_supports("avx512vnni")) return "the CPU has no AVX-512 VNNI";
  return "";
}

#elif NARROWCAST_ARM

const char* missing_for(Isa isa) {
  if (isa == Isa::scalar) return "";
  if (isa != Isa::neondot && isa != Isa::neoni8mm) return "it is for x86 processors, and this is an Arm processor";
  if (!has_dot_product()) return "the CPU has no dot product instructions (FEAT_DotProd)";
  if (isa == Isa::neoni8mm && !has_int8_matmul()) return "the CPU has no int8 matrix instructions (FEAT_I8MM)";
  return "";
}

#else

const char* missing_for(Isa isa) {
  return isa == Isa::scalar ? "" : "the library was built without vector instructions for this processor or compiler";
}

#endif

bool runs_here(Isa isa) { return missing_for(isa)[0] == '\0'; }

// -1 when there is no such tier.
int find_isa(const char* name) {
  for (int index = kIsaCount - 1; index >= 0; --index) {
    if (std::strcmp(name, kIsaNames[index]) != 0) continue;
    const bool other_encoding = static_cast<Isa>(index) == Isa::avxvnni && !runs_here(Isa::avxvnni) &&
                                runs_here(Isa::avxvnni_evex);
    return other_encoding ? static_cast<int>(Isa::avxvnni_evex) : index;
  }
  return -1;
}

int initial_isa() {
  // An unknown or unavailable NARROWCAST_ISA is reported by Python before any op runs; here it is only not obeyed.
  const char* forced = std::getenv("NARROWCAST_ISA");
  if (forced != nullptr) {
    const int index = find_isa(forced);
    if (index >= 0 && runs_here(static_cast<Isa>(index))) return index;
  }
  int best = 0;
  for (int index = 1; index < kIsaCount; ++index) {
    if (runs_here(static_cast<Isa>(index))) best = index;
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

// What is particular about how a tier runs here; mostly empty.
NARROWCAST_EXPORT const char* narrowcast_isa_note(const char* name) {
  return narrowcast::find_isa(name) == static_cast<int>(narrowcast::Isa::avxvnni_evex)
             ? "in AVX-512's encoding: this CPU has no AVX-VNNI of its own"
             : "";
}

// Switches the tier of the whole process; 0 on success, 1 when the tier is unknown or cannot run here.
NARROWCAST_EXPORT int narrowcast_set_isa(const char* name) {
  const char* missing = narrowcast_isa_missing(name);
  if (missing == nullptr || missing[0] != '\0') return 1;
  narrowcast::current_isa().store(narrowcast::find_isa(name), std::memory_order_relaxed);
  return 0;
}
