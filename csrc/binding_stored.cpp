// Checks of a stored weight's tensors, declared in binding_stored.h.
#include "binding_stored.h"

namespace narrowcast {
namespace {

ScaleType scale_type(const Tensor& scale, const char* op) {
  NARROWCAST_CHECK(scale.is_cpu() && scale.dim() == 2, op, "scale must be a matrix on the CPU, got shape ",
                   shape_text(scale));
  switch (scale.scalar_type()) {
    case ScalarType::Float: return ScaleType::float32;
    case ScalarType::Half: return ScaleType::float16;
    case ScalarType::Byte: return ScaleType::e8m0;
    default: fail(op, "scale must be float32, float16 or uint8 (e8m0)");
  }
}

}  // namespace

StoredWeightArguments::StoredWeightArguments(const Tensor& codes, const Tensor& scale,
                                             const std::optional<Tensor>& zero_point,
                                             const std::optional<Tensor>& levels, int64_t bits, int64_t group,
                                             int64_t columns, const char* op) {
  NARROWCAST_CHECK((bits >= 2 && bits <= 6) || bits == 8, op, "bits must be 2..6 or 8, got ", bits);
  NARROWCAST_CHECK(group > 0, op, "group must be positive, got ", group);
  NARROWCAST_CHECK(columns >= 0, op, "columns must not be negative, got ", columns);
  const bool is_signed = bits == 8 && codes.scalar_type() == ScalarType::Char;
  check_tensor(codes, is_signed ? ScalarType::Char : ScalarType::Byte, 2, op, "codes");
  const int64_t bytes = divide_up(columns * bits, 8), groups = divide_up(columns, group);
  NARROWCAST_CHECK(codes.size(1) == bytes, op, "rows of ", codes.size(1), " bytes cannot hold ", columns, " codes of ",
                   bits, " bits");
  rows_ = codes.size(0);
  const ScaleType type = scale_type(scale, op);
  const bool shared = scale.size(0) == 1;
  NARROWCAST_CHECK((shared || scale.size(0) == rows_) && scale.size(1) == groups, op, "scale must have shape [", rows_,
                   ", ", groups, "], got ", shape_text(scale));
  codes_ = Contiguous(codes), scale_ = Contiguous(scale);
  bool zero_is_half = false;
  if (zero_point.has_value()) {
    zero_is_half = zero_point->scalar_type() == ScalarType::Half;
    check_tensor(*zero_point, zero_is_half ? ScalarType::Half : ScalarType::Byte, 2, op, "zero_point");
    NARROWCAST_CHECK(zero_point->size(0) == scale.size(0) && zero_point->size(1) == groups, op,
                     "zero_point must have shape ", shape_text(scale), ", got ", shape_text(*zero_point));
    NARROWCAST_CHECK(!levels.has_value(), op, "levels have no zero points");
    zero_point_ = Contiguous(*zero_point);
  }
  int64_t levels_stride = 0;
  if (levels.has_value()) {
    const int64_t count = int64_t{1} << bits;
    if (levels->dim() == 3) {
      check_tensor(*levels, ScalarType::Float, 3, op, "levels");
      NARROWCAST_CHECK(levels->size(0) == rows_ && levels->size(1) == groups && levels->size(2) == count, op,
                       "levels must have shape [", rows_, ", ", groups, ", ", count, "], got ", shape_text(*levels));
      levels_stride = groups * count;
    } else {
      check_tensor(*levels, ScalarType::Float, 1, op, "levels");
      check_length(*levels, count, op, "levels");
    }
    NARROWCAST_CHECK(!is_signed, op, "codes of levels must be uint8");
    levels_ = Contiguous(*levels);
  }
  weight_ = {codes_.data<uint8_t>(),
             bytes,
             static_cast<int>(bits),
             is_signed,
             scale_.data(),
             type,
             zero_point_.data(),
             zero_is_half,
             levels_.data<float>(),
             levels_stride,
             shared ? 0 : groups,
             group,
             columns};
}

}  // namespace narrowcast
