// Bodies of the torch-side helpers declared in binding.h.
#include "binding.h"

#include <cstdlib>

namespace narrowcast {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

const char* type_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Double: return "float64";
    case ScalarType::Char: return "int8";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}

}  // namespace

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "[";
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) text << (axis ? ", " : "") << tensor.size(axis);
  text << "]";
  return text.str();
}

void check_tensor(const Tensor& tensor, ScalarType type, int64_t dimensions, const char* op, const char* name) {
  NARROWCAST_CHECK(tensor.is_cpu(), op, name, " must be on the CPU");
  NARROWCAST_CHECK(tensor.scalar_type() == type, op, name, " must be ", type_name(type), ", got ",
                   type_name(tensor.scalar_type()));
  NARROWCAST_CHECK(tensor.dim() == dimensions, op, name, " must have ", dimensions, " dimensions, got shape ",
                   shape_text(tensor));
}

void check_length(const Tensor& tensor, int64_t length, const char* op, const char* name) {
  NARROWCAST_CHECK(tensor.dim() == 1 && tensor.size(0) == length, op, name, " must have shape [", length, "], got ",
                   shape_text(tensor));
}

Contiguous::Contiguous(const std::optional<Tensor>& tensor, int64_t length, const char* op, const char* name) {
  if (!tensor.has_value()) return;
  check_length(*tensor, length, op, name);
  if (float_type(*tensor, op, name) != FloatType::float32 || !tensor->is_contiguous()) {
    copy_ = as_float32(*tensor, op, name);
  }
  data_ = (copy_.has_value() ? *copy_ : *tensor).const_data_ptr();
}

FloatType float_type(const Tensor& tensor, const char* op, const char* name) {
  NARROWCAST_CHECK(tensor.is_cpu(), op, name, " must be on the CPU");
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return FloatType::float32;
    case ScalarType::BFloat16: return FloatType::bfloat16;
    case ScalarType::Half: return FloatType::float16;
    default: fail(op, name, " must be float32, bfloat16 or float16, got ", type_name(tensor.scalar_type()));
  }
}

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Tensor as_float32(const Tensor& tensor, const char* op, const char* name) {
  if (float_type(tensor, op, name) == FloatType::float32) return as_contiguous(tensor);
  Tensor result = empty_tensor(tensor.sizes().data(), tensor.dim(), FloatType::float32);
  torch::stable::copy_(result, tensor);
  return result;
}

Tensor empty_tensor(const int64_t* sizes, int64_t dimensions, ScalarType type) {
  int64_t strides[16];
  NARROWCAST_CHECK(dimensions <= 16, "empty_tensor", "more than 16 dimensions");
  int64_t stride = 1;
  for (int64_t axis = dimensions - 1; axis >= 0; --axis) {
    strides[axis] = stride;
    stride *= sizes[axis] > 0 ? sizes[axis] : 1;
  }
  AtenTensorHandle handle;
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dimensions, sizes, strides, dtype,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Contiguous int8_zero_points(const std::optional<Tensor>& zero_point, int64_t rows, const char* op) {
  if (!zero_point.has_value()) return Contiguous();
  check_tensor(*zero_point, ScalarType::Byte, 1, op, "zero_point");
  check_length(*zero_point, rows, op, "zero_point");
  return Contiguous(*zero_point);
}

InputRange::InputRange(const Tensor& inverse, const Tensor& zero_point, int64_t channels, const char* op) {
  check_tensor(inverse, ScalarType::Float, 1, op, "input_inverse");
  check_tensor(zero_point, ScalarType::Int, 1, op, "input_zero_point");
  const int64_t count = inverse.numel();
  NARROWCAST_CHECK(count == 1 || count == channels, op, "input_inverse must have 1 or ", channels, " entries, got ",
                   count);
  check_length(zero_point, count, op, "input_zero_point");
  inverse_ = Contiguous(inverse), zero_point_ = Contiguous(zero_point);
  const auto* bits = inverse_.data<int32_t>();
  const int32_t* zeros = zero_point_.data<int32_t>();
  int32_t wrong = 0, all = 0, changes = 0;
  for (int64_t i = 0; i < count; ++i) {  // a float is positive and finite when its bits are in 1..0x7f7fffff
    wrong |= (bits[i] < 1) | (bits[i] >= 0x7f800000);
    all |= zeros[i];
    changes |= zeros[i] ^ zeros[0];
  }
  NARROWCAST_CHECK(wrong == 0, op, "input_inverse must be positive and finite");
  NARROWCAST_CHECK((all & ~255) == 0, op, "input_zero_point must be in 0..255");
  per_channel_ = count != 1, one_zero_point_ = changes == 0;
}

Tensor empty_tensor(const int64_t* sizes, int64_t dimensions, FloatType type) {
  constexpr ScalarType types[] = {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};
  return empty_tensor(sizes, dimensions, types[static_cast<int>(type)]);
}

void* workspace(Slot slot, int64_t bytes) {
  thread_local Buffer buffers[3];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (buffer.bytes < bytes) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const int64_t size = round_up(bytes, 4096);
    buffer.data = std::aligned_alloc(64, static_cast<size_t>(size));
    NARROWCAST_CHECK(buffer.data != nullptr, "workspace", "out of memory (", size, " bytes)");
    buffer.bytes = size;
  }
  return buffer.data;
}

}  // namespace narrowcast
