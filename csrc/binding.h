// Torch-side helpers of the bindings_*.cpp files: checks, tensors, workspaces and threads. Stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace narrowcast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError("narrowcast.<op>: <message>") in Python; the message is only built when the check fails.
#define NARROWCAST_CHECK(condition, op, ...) \
  if (__builtin_expect(!(condition), 0)) ::narrowcast::fail(op, __VA_ARGS__)

template <class... Parts>
[[noreturn]] __attribute__((noinline, cold)) void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "narrowcast." << op << ": ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape_text(const Tensor& tensor);

// Checks dtype, number of dimensions and device; `name` is the argument's name in the schema.
void check_tensor(const Tensor& tensor, ScalarType type, int64_t dimensions, const char* op, const char* name);

// Checks that a tensor of any dtype is a vector of the given length.
void check_length(const Tensor& tensor, int64_t length, const char* op, const char* name);

// The element type of an activation tensor; raises for anything but float32, bfloat16 and float16, or off the CPU.
FloatType float_type(const Tensor& tensor, const char* op, const char* name);

// The tensor itself when contiguous, else a contiguous copy.
Tensor as_contiguous(const Tensor& tensor);

// A contiguous float32 copy of any float tensor, or the tensor itself when it is one already.
Tensor as_float32(const Tensor& tensor, const char* op, const char* name);

// Read access to a tensor as contiguous memory: borrowed when it is contiguous (no reference counting), else a copy
// that lives as long as this object. The tensor must outlive it.
class Contiguous {
 public:
  Contiguous() = default;  // data() is null
  explicit Contiguous(const Tensor& tensor) {
    if (!tensor.is_contiguous()) copy_ = torch::stable::contiguous(tensor);
    data_ = (copy_.has_value() ? *copy_ : tensor).const_data_ptr();
  }
  // An optional float vector such as a bias, converted to float32; data() is null when it is absent.
  Contiguous(const std::optional<Tensor>& tensor, int64_t length, const char* op, const char* name);

  template <class Type = void>
  const Type* data() const {
    return static_cast<const Type*>(data_);
  }

 private:
  std::optional<Tensor> copy_;
  const void* data_ = nullptr;
};

// The optional zero points of int8 rows, stored as zero point + 128 in uint8 [rows]; data() is null when absent.
Contiguous int8_zero_points(const std::optional<Tensor>& zero_point, int64_t rows, const char* op);

// How the caller fixed the codes of a static op's input: code = rne(x * inverse) + zero_point, clamped to 0..255, with
// one pair for all channels or one per channel. Raises unless inverse > 0 and zero_point is in 0..255 everywhere.
class InputRange {
 public:
  InputRange(const Tensor& inverse, const Tensor& zero_point, int64_t channels, const char* op);

  const float* inverse() const { return inverse_.data<float>(); }
  const int32_t* zero_point() const { return zero_point_.data<int32_t>(); }
  bool per_channel() const { return per_channel_; }
  // Whether all channels have the first one's zero point.
  bool one_zero_point() const { return one_zero_point_; }

 private:
  Contiguous inverse_, zero_point_;
  bool per_channel_, one_zero_point_;
};

// A new uninitialised contiguous CPU tensor.
Tensor empty_tensor(const int64_t* sizes, int64_t dimensions, FloatType type);
Tensor empty_tensor(const int64_t* sizes, int64_t dimensions, ScalarType type);

// A 64-byte aligned buffer that belongs to the calling thread and lives until the next call with the same slot.
enum class Slot : int { codes = 0, panel = 1, extra = 2 };
void* workspace(Slot slot, int64_t bytes);

// Runs task(index) for 0 <= index < count on torch's threads. Chunks are taken from a shared counter, so that a
// thread that the system holds up does not hold up the call. Results must not depend on who runs which index.
template <class Task>
void for_each_task(int64_t count, bool parallel, const Task& task) {
  const int64_t threads = parallel ? static_cast<int64_t>(torch::stable::get_num_threads()) : 1;
  if (threads <= 1 || count <= 1) {
    for (int64_t index = 0; index < count; ++index) task(index);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < count ? threads : count, 1, [&](int64_t, int64_t) {
    for (int64_t index = next.fetch_add(1); index < count; index = next.fetch_add(1)) task(index);
  });
}

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }
inline int64_t round_up(int64_t value, int64_t multiple) { return divide_up(value, multiple) * multiple; }

}  // namespace narrowcast
