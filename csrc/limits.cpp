// The machine's limits as C functions for benchmarks, called through ctypes; each answers for the tier in use.
#include "limits.h"

#include <cstring>

#include "kernels.h"

namespace narrowcast {
namespace {

const LimitKernels* limits_of_tier() {
#if NARROWCAST_X86
  if (active_isa() == Isa::avx512vnni) return &kLimitsAvx512vnni;
  if (active_isa() == Isa::avx2) return &kLimitsAvx2;
#endif
  return nullptr;
}

bool has_bfloat16() {
#if NARROWCAST_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace narrowcast

#if defined(_WIN32)
#define NARROWCAST_EXPORT extern "C" __declspec(dllexport)
#else
#define NARROWCAST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Multiplies in "int8", "float32" or "bfloat16" for so many rounds; the multiply-accumulates done, 0 where unknown.
NARROWCAST_EXPORT int64_t narrowcast_limit_multiply(const char* format, int64_t iterations) {
  const narrowcast::LimitKernels* kernels = narrowcast::limits_of_tier();
  if (kernels == nullptr) return 0;
  if (std::strcmp(format, "int8") == 0) return kernels->multiply_int8(iterations);
  if (std::strcmp(format, "float32") == 0) return kernels->multiply_float32(iterations);
  if (std::strcmp(format, "bfloat16") != 0 || kernels->multiply_bfloat16 == nullptr) return 0;
  return narrowcast::has_bfloat16() ? kernels->multiply_bfloat16(iterations) : 0;
}

// Reads `bytes` (a multiple of 1024) from `data` so often; the bytes read, 0 where the tier has no reader.
NARROWCAST_EXPORT int64_t narrowcast_limit_read(const void* data, int64_t bytes, int64_t repeats) {
  const narrowcast::LimitKernels* kernels = narrowcast::limits_of_tier();
  if (kernels == nullptr || bytes % 1024 != 0) return 0;
  kernels->read(data, bytes, repeats);
  return bytes * repeats;
}
