// Torch bindings of conv2d_int8 and of its weight packing.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <vector>

#include "binding.h"
#include "conv_plan.h"

namespace narrowcast {
namespace {

using Ints = std::vector<int64_t>;

constexpr uint32_t kInfinityBits = 0x7f800000u;
constexpr float kSmallestRange = 0x1p-100f;  // below this a sample counts as all zero: 127 / range would overflow

void check_ints(const Ints& values, size_t count, int64_t smallest, const char* op, const char* name) {
  NARROWCAST_CHECK(values.size() == count, op, name, " must have ", count, " entries, got ", values.size());
  for (const int64_t value : values) {
    NARROWCAST_CHECK(value >= smallest && value < (1 << 20), op, name, " holds ", value);
  }
}

Tensor conv2d_int8_pack(Tensor weight, Ints kernel_size, int64_t groups) {
  constexpr const char* op = "conv2d_int8_pack";
  check_tensor(weight, ScalarType::Char, 2, op, "weight");
  check_ints(kernel_size, 2, 1, op, "kernel_size");
  const int64_t rows = weight.size(0), taps = kernel_size[0] * kernel_size[1];
  NARROWCAST_CHECK(groups >= 1 && rows % groups == 0, op, groups, " groups do not divide ", rows, " output channels");
  NARROWCAST_CHECK(rows > 0 && weight.size(1) > 0 && weight.size(1) % taps == 0, op, "weight ", shape_text(weight),
                   " does not fit a kernel of ", taps, " taps");
  weight = as_contiguous(weight);
  const int64_t inputs = weight.size(1) / taps, bytes = packed_bytes(rows, inputs, taps, groups);
  Tensor packed = empty_tensor(&bytes, 1, ScalarType::Char);
  pack_weight(static_cast<const int8_t*>(weight.const_data_ptr()), rows, inputs, taps, groups,
              static_cast<int8_t*>(packed.mutable_data_ptr()));
  return packed;
}

Tensor conv2d_int8_unpack(Tensor packed, int64_t out_channels, int64_t inputs, Ints kernel_size, int64_t groups) {
  constexpr const char* op = "conv2d_int8_unpack";
  check_tensor(packed, ScalarType::Char, 1, op, "packed");
  check_ints(kernel_size, 2, 1, op, "kernel_size");
  NARROWCAST_CHECK(groups >= 1 && out_channels > 0 && inputs > 0 && out_channels % groups == 0, op, groups,
                   " groups do not divide ", out_channels, " output channels");
  const int64_t taps = kernel_size[0] * kernel_size[1];
  NARROWCAST_CHECK(packed.numel() == packed_bytes(out_channels, inputs, taps, groups), op, "packed has ",
                   packed.numel(), " bytes, expected ", packed_bytes(out_channels, inputs, taps, groups));
  packed = as_contiguous(packed);
  const int64_t sizes[] = {out_channels, inputs * taps};
  Tensor weight = empty_tensor(sizes, 2, ScalarType::Char);
  unpack_weight(static_cast<const int8_t*>(packed.const_data_ptr()), out_channels, inputs, taps, groups,
                static_cast<int8_t*>(weight.mutable_data_ptr()));
  return weight;
}

bool dense_sample(const ConvShape& s) {
  if (s.interleaved) return s.column_stride == s.channels && s.row_stride == s.width * s.channels;
  return s.column_stride == 1 && s.row_stride == s.width && s.channel_stride == s.width * s.height;
}

void read_strides(const Tensor& x, ConvShape& s) {
  s.sample_stride = x.stride(0);
  // A dimension of size one may have any stride.
  s.column_stride = s.width > 1 ? x.stride(3) : s.channels > 1 && x.stride(1) == 1 ? s.channels : 1;
  s.interleaved = s.channels > 1 && x.stride(1) == 1 && (s.column_stride == s.channels);
  s.row_stride = s.height > 1 ? x.stride(2) : s.width * s.column_stride;
  s.channel_stride = s.interleaved ? 1 : s.channels > 1 ? x.stride(1) : s.height * s.width;
}

// The input as float32 whose samples are gapless, planar or interleaved.
Tensor dense_input(Tensor x, ConvShape& s) {
  s.batch = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
  read_strides(x, s);
  if (x.scalar_type() == ScalarType::Float && dense_sample(s)) return x;
  const bool keep = s.interleaved && dense_sample(s);
  const int64_t sizes[] = {s.batch, s.channels, s.height, s.width};
  const int64_t plane = s.height * s.width;
  const int64_t planar[] = {s.channels * plane, plane, s.width, 1};
  const int64_t interleaved[] = {s.channels * plane, 1, s.width * s.channels, s.channels};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, keep ? interleaved : planar,
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  Tensor copy(handle);
  torch::stable::copy_(copy, x);
  read_strides(copy, s);
  return copy;
}

[[noreturn]] void fail_not_finite(const ConvShape& s, const float* input) {
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t y = 0; y < s.height; ++y) {
        for (int64_t x = 0; x < s.width; ++x) {
          const float* at = input + b * s.sample_stride + c * s.channel_stride + y * s.row_stride + x * s.column_stride;
          if (!std::isfinite(*at)) fail("conv2d_int8", "Non-finite value in x at [", b, ", ", c, ", ", y, ", ", x, "]");
        }
      }
    }
  }
  fail("conv2d_int8", "Non-finite value in x");
}

// One symmetric scale per sample: |x| up to absmax becomes -127..127, stored with 128 added.
void measure_samples(const ConvShape& s, const float* input, const ConvKernels& kernels, CodeRange* range,
                     float* scale) {
  const int64_t values = s.channels * s.height * s.width;
  const int64_t parts = std::max<int64_t>(1, values / 32768);
  std::vector<uint32_t> bits(static_cast<size_t>(s.batch * parts));
  for_each_task(s.batch * parts, s.batch * values > 65536, [&](int64_t task) {
    const int64_t sample = task / parts, part = task % parts;
    const int64_t begin = values * part / parts, end = values * (part + 1) / parts;
    bits[static_cast<size_t>(task)] = kernels.magnitude_bits(input + sample * s.sample_stride + begin, end - begin, 0);
  });
  for (int64_t sample = 0; sample < s.batch; ++sample) {
    const auto first = bits.begin() + sample * parts;
    const uint32_t largest = *std::max_element(first, first + parts);
    if (largest >= kInfinityBits) fail_not_finite(s, input);
    float absmax;
    std::memcpy(&absmax, &largest, 4);
    const bool zero = absmax < kSmallestRange;
    range[sample] = {zero ? 0.0f : 127.0f / absmax, -127.0f, 127.0f, 128};
    scale[sample] = zero ? 1.0f : absmax / 127.0f;
  }
}

void run_conv(ConvCall& call) {
  const ConvShape& s = call.shape;
  const ConvPlan plan = plan_conv(s, *call.kernels, static_cast<int64_t>(torch::stable::get_num_threads()));
  const auto body = s.depthwise() ? depthwise_task : dense_task;
  std::atomic<bool> bad{false};
  for_each_task(plan.tasks(), plan.parallel, [&](int64_t task) {
    auto* scratch = static_cast<uint8_t*>(workspace(Slot::codes, plan.scratch_bytes));
    if (body(call, plan, task, scratch) >= kInfinityBits) bad.store(true, std::memory_order_relaxed);
  });
  if (bad.load()) fail_not_finite(s, call.input);
}

// The integers of a call in the order of the schema; narrowcast.kernels.reference_conv.conv_plan writes the same.
enum Plan : int {
  kKernelH, kKernelW, kStrideH, kStrideW, kTop, kLeft, kBottom, kRight, kDilationH, kDilationW, kGroups,
  kUpH, kUpW, kMoreH, kMoreW, kChannelsLast, kPlanSize
};

void check_plan(const int64_t* plan, const char* op) {
  constexpr const char* names[] = {
      "kernel_size", "kernel_size", "stride",   "stride", "padding",  "padding",        "padding",       "padding",
      "dilation",    "dilation",    "groups",   "upsample", "upsample", "output_padding", "output_padding"};
  for (int i = kKernelH; i < kChannelsLast; ++i) {
    const bool may_be_zero = (i >= kTop && i <= kRight) || i == kMoreH || i == kMoreW;
    NARROWCAST_CHECK(plan[i] >= (may_be_zero ? 0 : 1) && plan[i] < (1 << 20), op, names[i - kKernelH], " holds ",
                     plan[i]);
  }
}

int64_t out_size(int64_t size, const int64_t* plan, int axis) {
  const int64_t upsampled = (size - 1) * plan[kUpH + axis] + 1;
  const int64_t padded_size = upsampled + plan[kTop + axis] + plan[kBottom + axis] + plan[kMoreH + axis];
  const int64_t reach = plan[kDilationH + axis] * (plan[kKernelH + axis] - 1) + 1;
  return padded_size < reach ? 0 : (padded_size - reach) / plan[kStrideH + axis] + 1;
}

void set_shape(ConvShape& s, const int64_t* plan, int64_t out_channels, const Tensor& x) {
  constexpr const char* op = "conv2d_int8";
  check_plan(plan, op);
  s.groups = plan[kGroups], s.out_channels = out_channels;
  NARROWCAST_CHECK(out_channels >= 1 && s.channels >= 1, op, "no channels");
  NARROWCAST_CHECK(s.channels % s.groups == 0 && out_channels % s.groups == 0, op, s.groups, " groups do not divide ",
                   s.channels, " input and ", out_channels, " output channels");
  s.kernel_h = plan[kKernelH], s.kernel_w = plan[kKernelW], s.stride_h = plan[kStrideH], s.stride_w = plan[kStrideW];
  s.top = plan[kTop], s.left = plan[kLeft], s.dilation_h = plan[kDilationH], s.dilation_w = plan[kDilationW];
  s.up_h = plan[kUpH], s.up_w = plan[kUpW], s.channels_last = plan[kChannelsLast] != 0;
  NARROWCAST_CHECK(s.height > 0 && s.width > 0, op, "x ", shape_text(x), " has no pixels");
  s.out_height = out_size(s.height, plan, 0), s.out_width = out_size(s.width, plan, 1);
  NARROWCAST_CHECK(s.out_height > 0 && s.out_width > 0, op, "x ", shape_text(x), " is smaller than the kernel");
}

Tensor new_output(const ConvShape& s) {
  const int64_t sizes[] = {s.batch, s.out_channels, s.out_height, s.out_width};
  const int64_t plane = s.out_height * s.out_width;
  const int64_t planar[] = {s.out_channels * plane, plane, s.out_width, 1};
  const int64_t interleaved[] = {s.out_channels * plane, 1, s.out_width * s.out_channels, s.out_channels};
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes, s.channels_last ? interleaved : planar,
                                                         aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// Static: the ranges that the caller fixed (`scale` then holds the input scale already); dynamic: one per sample.
void set_ranges(ConvCall& call, const std::optional<InputRange>& input, std::vector<uint8_t>& zero_row,
                CodeRange* range, float* scale) {
  const ConvShape& s = call.shape;
  if (!input) return measure_samples(s, call.input, *call.kernels, range, scale);
  const auto zero = static_cast<float>(*input->zero_point());
  std::fill_n(range, s.batch, CodeRange{*input->inverse(), -zero, 255.0f - zero, *input->zero_point()});
  std::fill_n(scale, s.batch, 1.0f);
  if (!input->per_channel()) return;
  call.channel_range = {input->inverse(), input->zero_point()};
  if (input->one_zero_point() || s.depthwise()) return;
  const DenseLayout layout = dense_layout(s);
  zero_row.resize(static_cast<size_t>(layout.row_pixels * layout.pixel_bytes));
  write_zero_row(s, input->zero_point(), zero_row.data());
  call.zero_row = zero_row.data();
}

const float* channel_values(const Tensor& tensor, int64_t channels, const char* name) {
  NARROWCAST_CHECK(tensor.dim() == 1 && tensor.numel() == channels, "conv2d_int8", name, " ", shape_text(tensor),
                   " for ", channels, " output channels");
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor conv2d_int8_planned(Tensor x, Tensor packed, Tensor scale, Tensor zero_sum, std::optional<Tensor> bias,
                           std::optional<Tensor> input_inverse, std::optional<Tensor> input_zero_point, Ints plan) {
  constexpr const char* op = "conv2d_int8";
  NARROWCAST_CHECK(plan.size() == kPlanSize, op, "plan must have ", +kPlanSize, " entries, got ", plan.size());
  const FloatType type = float_type(x, op, "x");
  NARROWCAST_CHECK(x.dim() == 4, op, "x must have 4 dimensions, got shape ", shape_text(x));
  check_tensor(packed, ScalarType::Char, 1, op, "packed");
  check_tensor(scale, ScalarType::Float, 1, op, "scale");
  check_tensor(zero_sum, ScalarType::Int, 1, op, "zero_sum");
  NARROWCAST_CHECK(input_inverse.has_value() == input_zero_point.has_value(), op,
                   "input_inverse and input_zero_point must be given together or not at all");
  ConvCall call{};
  ConvShape& s = call.shape;
  const int64_t outputs = scale.size(0);
  const Tensor input = dense_input(x, s);
  set_shape(s, plan.data(), outputs, x);
  const int64_t bytes = packed_bytes(outputs, s.group_inputs(), s.kernel_h * s.kernel_w, s.groups);
  NARROWCAST_CHECK(packed.numel() == bytes, op, "packed has ", packed.numel(), " bytes, expected ", bytes);
  packed = as_contiguous(packed), scale = as_contiguous(scale), zero_sum = as_contiguous(zero_sum);
  const std::optional<Tensor> offsets = bias ? std::optional<Tensor>(as_float32(*bias, op, "bias")) : std::nullopt;
  call.kernels = &kConvTiers.active();
  call.input = static_cast<const float*>(input.const_data_ptr());
  call.packed = static_cast<const int8_t*>(packed.const_data_ptr());
  call.scale = channel_values(scale, outputs, "scale");
  call.bias = offsets ? channel_values(*offsets, outputs, "bias") : nullptr;
  channel_values(zero_sum, outputs, "zero_sum");
  call.zero_sum = static_cast<const int32_t*>(zero_sum.const_data_ptr());
  Tensor output = new_output(s);
  call.output = static_cast<float*>(output.mutable_data_ptr());
  std::vector<CodeRange> range(static_cast<size_t>(s.batch));
  std::vector<float> sample_scale(static_cast<size_t>(s.batch));
  std::vector<uint8_t> zero_row;
  std::optional<InputRange> fixed;
  if (input_inverse) fixed.emplace(*input_inverse, *input_zero_point, s.channels, op);
  set_ranges(call, fixed, zero_row, range.data(), sample_scale.data());
  call.range = range.data(), call.input_scale = sample_scale.data();
  if (s.batch > 0) run_conv(call);
  if (type == FloatType::float32) return output;
  return torch::stable::to(output, x.scalar_type());
}

Tensor conv2d_int8(Tensor x, Tensor packed, Tensor scale, Tensor zero_sum, std::optional<Tensor> bias,
                   std::optional<Tensor> input_inverse, std::optional<Tensor> input_zero_point, Ints kernel_size,
                   Ints stride, Ints padding, Ints dilation, int64_t groups, Ints upsample, Ints output_padding,
                   bool channels_last) {
  constexpr const char* op = "conv2d_int8";
  Ints plan;
  plan.reserve(kPlanSize);
  const auto append = [&](const Ints& values, size_t count, const char* name) {
    NARROWCAST_CHECK(values.size() == count, op, name, " must have ", count, " entries, got ", values.size());
    plan.insert(plan.end(), values.begin(), values.end());
  };
  append(kernel_size, 2, "kernel_size");
  append(stride, 2, "stride");
  append(padding, 4, "padding");
  append(dilation, 2, "dilation");
  plan.push_back(groups);
  append(upsample, 2, "upsample");
  append(output_padding, 2, "output_padding");
  plan.push_back(channels_last);
  return conv2d_int8_planned(std::move(x), std::move(packed), std::move(scale), std::move(zero_sum),
                             std::move(bias), std::move(input_inverse), std::move(input_zero_point), std::move(plan));
}

}  // namespace
}  // namespace narrowcast

STABLE_TORCH_LIBRARY_IMPL(narrowcast, CPU, library) {
  library.impl("conv2d_int8_pack", TORCH_BOX(&narrowcast::conv2d_int8_pack));
  library.impl("conv2d_int8_unpack", TORCH_BOX(&narrowcast::conv2d_int8_unpack));
  library.impl("conv2d_int8", TORCH_BOX(&narrowcast::conv2d_int8));
  library.impl("conv2d_int8_planned", TORCH_BOX(&narrowcast::conv2d_int8_planned));
}
