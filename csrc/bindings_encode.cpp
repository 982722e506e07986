// Torch bindings of the ops that quantize weights: rounding, error, packing, on all threads.
#include "binding.h"
#include "binding_encode.h"
#include "encode.h"

namespace narrowcast {
namespace {

// Checks shared by the ops below and the layout of one weight in groups.
struct Groups {
  int64_t rows, columns, group, count;

  Groups(const Tensor& matrix, int64_t group_size, const char* op) : group(group_size) {
    NARROWCAST_CHECK(group > 0, op, "group must be positive, got ", group);
    rows = matrix.size(0), columns = matrix.size(1);
    count = divide_up(columns, group);
  }

  void check(const Tensor& part, ScalarType type, const char* op, const char* name) const {
    check_tensor(part, type, 2, op, name);
    NARROWCAST_CHECK(part.size(0) == rows && part.size(1) == count, op, name, " must have shape [", rows, ", ", count,
                     "], got ", shape_text(part));
  }
};

// Runs one_row(row) for all rows; a task takes about 32768 values.
template <class OneRow>
void for_each_row(int64_t rows, int64_t columns, const OneRow& one_row) {
  const int64_t block = columns > 0 ? divide_up(32768, columns) : 1;
  for_each_task(divide_up(rows, block), rows * columns > 65536, [&](int64_t task) {
    const int64_t end = (task + 1) * block < rows ? (task + 1) * block : rows;
    for (int64_t row = task * block; row < end; ++row) one_row(row);
  });
}

std::tuple<Tensor, Tensor, Tensor> quantize_weight(const Tensor& weight, int64_t group, int64_t bits, bool symmetric,
                                                   int64_t scale_format) {
  constexpr const char* op = "quantize_weight";
  check_tensor(weight, ScalarType::Float, 2, op, "weight");
  const Groups layout(weight, group, op);
  const CodeBounds range = code_range(bits, symmetric, scale_format, op);
  const Contiguous values(weight);
  const int64_t sizes[] = {layout.rows, layout.columns}, parts[] = {layout.rows, layout.count};
  const int64_t zero_parts[] = {symmetric ? 0 : layout.rows, symmetric ? 0 : layout.count};
  Tensor codes = empty_tensor(sizes, 2, ScalarType::Char), scale = empty_tensor(parts, 2, FloatType::float32);
  Tensor zero_point = empty_tensor(zero_parts, 2, ScalarType::Int);
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  auto* scales = static_cast<float*>(scale.mutable_data_ptr());
  auto* zeros = symmetric ? nullptr : static_cast<int32_t*>(zero_point.mutable_data_ptr());
  const EncodeKernels& kernels = kEncodeTiers.active();
  for_each_row(layout.rows, layout.columns, [&](int64_t row) {
    const float* source = values.data<float>() + row * layout.columns;
    float* row_scale = scales + row * layout.count;
    int32_t* row_zero = zeros != nullptr ? zeros + row * layout.count : nullptr;
    kernels.choose(source, layout.columns, group, range, row_scale, row_zero);
    kernels.encode(source, layout.columns, group, range, row_scale, row_zero, out + row * layout.columns);
  });
  return {codes, scale, zero_point};
}

Tensor encode_weight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& zero_point, int64_t group,
                     int64_t bits) {
  constexpr const char* op = "encode_weight";
  check_tensor(weight, ScalarType::Float, 2, op, "weight");
  const Groups layout(weight, group, op);
  const CodeBounds range = code_range(bits, !zero_point.has_value(), 0, op);
  layout.check(scale, ScalarType::Float, op, "scale");
  if (zero_point.has_value()) layout.check(*zero_point, ScalarType::Int, op, "zero_point");
  const Contiguous values(weight), scales(scale), zeros = zero_point ? Contiguous(*zero_point) : Contiguous();
  const int64_t sizes[] = {layout.rows, layout.columns};
  Tensor codes = empty_tensor(sizes, 2, ScalarType::Char);
  auto* out = static_cast<int8_t*>(codes.mutable_data_ptr());
  const EncodeKernels& kernels = kEncodeTiers.active();
  for_each_row(layout.rows, layout.columns, [&](int64_t row) {
    const int32_t* row_zero = zeros.data() != nullptr ? zeros.data<int32_t>() + row * layout.count : nullptr;
    kernels.encode(values.data<float>() + row * layout.columns, layout.columns, group, range,
                   scales.data<float>() + row * layout.count, row_zero, out + row * layout.columns);
  });
  return codes;
}

Tensor quantization_error(const Tensor& weight, const Tensor& codes, const Tensor& scale,
                          const std::optional<Tensor>& zero_point, int64_t group) {
  constexpr const char* op = "quantization_error";
  check_tensor(weight, ScalarType::Float, 2, op, "weight");
  check_tensor(codes, ScalarType::Char, 2, op, "codes");
  const Groups layout(weight, group, op);
  NARROWCAST_CHECK(codes.size(0) == layout.rows && codes.size(1) == layout.columns, op, "codes have shape ",
                   shape_text(codes), ", the weight ", shape_text(weight));
  layout.check(scale, ScalarType::Float, op, "scale");
  if (zero_point.has_value()) layout.check(*zero_point, ScalarType::Int, op, "zero_point");
  const Contiguous values(weight), bytes(codes), scales(scale);
  const Contiguous zeros = zero_point.has_value() ? Contiguous(*zero_point) : Contiguous();
  const int64_t sums_size[] = {layout.rows, 2}, sizes[] = {2};
  Tensor sums = empty_tensor(sums_size, 2, ScalarType::Double), result = empty_tensor(sizes, 1, ScalarType::Double);
  auto* per_row = static_cast<double*>(sums.mutable_data_ptr());
  auto* total = static_cast<double*>(result.mutable_data_ptr());
  const EncodeKernels& kernels = kEncodeTiers.active();
  for_each_row(layout.rows, layout.columns, [&](int64_t row) {
    const int32_t* row_zero = zeros.data() != nullptr ? zeros.data<int32_t>() + row * layout.count : nullptr;
    per_row[2 * row] = per_row[2 * row + 1] = 0.0;
    kernels.error(values.data<float>() + row * layout.columns, bytes.data<int8_t>() + row * layout.columns,
                  layout.columns, group, scales.data<float>() + row * layout.count, row_zero, per_row + 2 * row,
                  per_row + 2 * row + 1);
  });
  total[0] = total[1] = 0.0;
  for (int64_t row = 0; row < layout.rows; ++row) total[0] += per_row[2 * row], total[1] += per_row[2 * row + 1];
  return result;
}

void check_packing(int64_t bits, int64_t offset, const char* op) {
  NARROWCAST_CHECK(bits >= 2 && bits <= 6, op, "bits must be in 2..6, got ", bits);
  NARROWCAST_CHECK(offset >= -128 && offset <= 0, op, "offset must be in -128..0, got ", offset);
}

Tensor pack_codes(const Tensor& codes, int64_t bits, int64_t offset) {
  constexpr const char* op = "pack_codes";
  const ScalarType type = codes.scalar_type() == ScalarType::Byte ? ScalarType::Byte : ScalarType::Char;
  check_tensor(codes, type, 2, op, "codes");
  check_packing(bits, offset, op);
  const int64_t rows = codes.size(0), columns = codes.size(1), width = divide_up(columns * bits, 8);
  const int64_t sizes[] = {rows, width};
  const Contiguous source(codes);
  Tensor packed = empty_tensor(sizes, 2, ScalarType::Byte);
  auto* target = static_cast<uint8_t*>(packed.mutable_data_ptr());
  std::atomic<bool> fits{true};
  const EncodeKernels& kernels = kEncodeTiers.active();
  for_each_row(rows, columns, [&](int64_t row) {
    const int64_t whole = columns / 8 * 8, left = columns - whole;
    const uint8_t* from = source.data<uint8_t>() + row * columns;
    bool good = kernels.pack(from, whole, static_cast<int>(bits), static_cast<int>(offset), target + row * width);
    if (left > 0) {  // the last few, filled up with the code whose field is 0
      uint8_t eight[8], bytes[8];
      for (int64_t i = 0; i < 8; ++i) eight[i] = i < left ? from[whole + i] : static_cast<uint8_t>(offset);
      good = kernels.pack(eight, 8, static_cast<int>(bits), static_cast<int>(offset), bytes) && good;
      for (int64_t i = 0; i < divide_up(left * bits, 8); ++i) target[row * width + whole * bits / 8 + i] = bytes[i];
    }
    if (!good) fits.store(false, std::memory_order_relaxed);
  });
  NARROWCAST_CHECK(fits.load(), op, "a code is outside ", offset, "..", offset + (1 << bits) - 1);
  return packed;
}

Tensor unpack_codes(const Tensor& packed, int64_t bits, int64_t offset, int64_t columns, bool is_signed) {
  constexpr const char* op = "unpack_codes";
  check_tensor(packed, ScalarType::Byte, 2, op, "packed");
  check_packing(bits, offset, op);
  const int64_t rows = packed.size(0), width = packed.size(1);
  NARROWCAST_CHECK(columns >= 0 && width == divide_up(columns * bits, 8), op, "rows of ", width, " bytes cannot hold ",
                   columns, " codes of ", bits, " bits");
  const int64_t sizes[] = {rows, columns};
  const Contiguous source(packed);
  Tensor codes = empty_tensor(sizes, 2, is_signed ? ScalarType::Char : ScalarType::Byte);
  auto* target = static_cast<uint8_t*>(codes.mutable_data_ptr());
  const EncodeKernels& kernels = kEncodeTiers.active();
  for_each_row(rows, columns, [&](int64_t row) {
    const int64_t whole = columns / 8 * 8, left = columns - whole;
    const uint8_t* from = source.data<uint8_t>() + row * width;
    kernels.unpack(from, whole, static_cast<int>(bits), static_cast<int>(offset), target + row * columns);
    if (left > 0) {
      uint8_t eight[8], bytes[8] = {};
      for (int64_t i = 0; i < divide_up(left * bits, 8); ++i) bytes[i] = from[whole * bits / 8 + i];
      kernels.unpack(bytes, 8, static_cast<int>(bits), static_cast<int>(offset), eight);
      for (int64_t i = 0; i < left; ++i) target[row * columns + whole + i] = eight[i];
    }
  });
  return codes;
}

}  // namespace

CodeBounds code_range(int64_t bits, bool symmetric, int64_t scale_format, const char* op) {
  NARROWCAST_CHECK(bits >= 2 && bits <= 8 && bits != 7, op, "bits must be 2..6 or 8, got ", bits);
  NARROWCAST_CHECK(scale_format >= 0 && scale_format <= 2, op, "scale_format must be in 0..2, got ", scale_format);
  const auto high = static_cast<float>((1 << (bits - 1)) - 1);
  return {symmetric ? -high : -high - 1.0f, high, symmetric, static_cast<ScaleFormat>(scale_format)};
}

}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("quantize_weight", TORCH_BOX(&narrowcast::quantize_weight));
  library.impl("encode_weight", TORCH_BOX(&narrowcast::encode_weight));
  library.impl("quantization_error", TORCH_BOX(&narrowcast::quantization_error));
  library.impl("pack_codes", TORCH_BOX(&narrowcast::pack_codes));
  library.impl("unpack_codes", TORCH_BOX(&narrowcast::unpack_codes));
}
