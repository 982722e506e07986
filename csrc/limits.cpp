// The machine's limits as C functions for benchmarks, called through ctypes; each answers for the tier in use.
#include "limits.h"

#include <cstring>

namespace narrowcast {
namespace {

bool has_bfloat16() {
#if NARROWCAST_X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") != 0;
#else
  return false;
#endif
}

}  // namespace

extern const LimitKernels kLimitsScalar{nullptr, nullptr, nullptr, nullptr};

}  // namespace narrowcast

#if defined(_WIN32)
#define NARROWCAST_EXPORT extern "C" __declspec(dllexport)
#else
#define NARROWCAST_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Multiplies in "int8", "float32" or "bfloat16" for so many rounds; the multiply-accumulates done, 0 where unknown.
NARROWCAST_EXPORT int64_t narrowcast_limit_multiply(const char* format, int64_t iterations) {
  const narrowcast::LimitKernels& kernels = narrowcast::kLimitTiers.active();
  int64_t (*multiply)(int64_t) = nullptr;
  if (std::strcmp(format, "int8") == 0) multiply = kernels.multiply_int8;
  if (std::strcmp(format, "float32") == 0) multiply = kernels.multiply_float32;
  if (std::strcmp(format, "bfloat16") == 0 && narrowcast::has_bfloat16()) multiply = kernels.multiply_bfloat16;
  return multiply == nullptr ? 0 : multiply(iterations);
}

// Reads `bytes` (a multiple of 1024) from `data` so often; the bytes read, 0 where the tier has no reader.
NARROWCAST_EXPORT int64_t narrowcast_limit_read(const void* data, int64_t bytes, int64_t repeats) {
  const narrowcast::LimitKernels& kernels = narrowcast::kLimitTiers.active();
  if (kernels.read == nullptr || bytes % 1024 != 0) return 0;
  kernels.read(data, bytes, repeats);
  return bytes * repeats;
}
