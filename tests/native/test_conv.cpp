// Whole convolutions, dense and depthwise, through the same plan and tasks as the op: quantizers, dot products and
// epilogues of every layout.
#include "check.h"
#include "conv_plan.h"

namespace narrowcast::test {
namespace {

struct Padding {
  int64_t bottom, right;
};

int64_t out_size(int64_t size, int64_t up, int64_t before, int64_t after, int64_t reach, int64_t stride) {
  const int64_t all = (size - 1) * up + 1 + before + after;
  return all < reach ? 0 : (all - reach) / stride + 1;
}

ConvShape random_shape(Random& random) {
  ConvShape s{};
  const bool depthwise = random.chance(35);
  s.batch = random.between(1, 3);
  s.groups = depthwise ? random.between(1, 40) : random.chance(20) ? random.between(2, 3) : 1;
  s.channels = depthwise ? s.groups : s.groups * random.between(1, random.chance(30) ? 70 : 20);
  s.out_channels = depthwise ? s.groups : s.groups * random.between(1, random.chance(30) ? 70 : 20);
  s.kernel_h = random.between(1, 5), s.kernel_w = random.chance(50) ? s.kernel_h : random.between(1, 5);
  s.stride_h = random.between(1, 3), s.stride_w = random.chance(50) ? s.stride_h : random.between(1, 5);
  s.dilation_h = random.chance(70) ? 1 : 2, s.dilation_w = random.chance(70) ? 1 : random.between(2, 3);
  s.up_h = random.chance(90) ? 1 : 2, s.up_w = random.chance(90) ? 1 : 2;
  s.top = random.between(0, 3), s.left = random.between(0, 3);
  const Padding padding = {random.between(0, 3), random.between(0, 3)};
  const int64_t reach_h = (s.kernel_h - 1) * s.dilation_h + 1, reach_w = (s.kernel_w - 1) * s.dilation_w + 1;
  do {
    s.height = random.between(1, 14), s.width = random.between(1, random.chance(20) ? 70 : 20);
    s.out_height = out_size(s.height, s.up_h, s.top, padding.bottom, reach_h, s.stride_h);
    s.out_width = out_size(s.width, s.up_w, s.left, padding.right, reach_w, s.stride_w);
  } while (s.out_height <= 0 || s.out_width <= 0);
  s.interleaved = s.channels > 1 && random.chance(50);
  s.channels_last = random.chance(50);
  s.sample_stride = s.channels * s.height * s.width;
  s.column_stride = s.interleaved ? s.channels : 1;
  s.row_stride = s.width * s.column_stride;
  s.channel_stride = s.interleaved ? 1 : s.height * s.width;
  return s;
}

std::string text(const ConvShape& s) {
  std::string result = "conv2d";
  const auto add = [&](const char* name, int64_t a, int64_t b) {
    result += std::string(" ") + name + " " + std::to_string(a) + "x" + std::to_string(b);
  };
  add("channels", s.channels, s.out_channels), add("groups", s.groups, s.batch), add("size", s.height, s.width);
  add("kernel", s.kernel_h, s.kernel_w), add("stride", s.stride_h, s.stride_w);
  add("dilation", s.dilation_h, s.dilation_w), add("up", s.up_h, s.up_w), add("at", s.top, s.left);
  return result + (s.interleaved ? " interleaved" : " planar") + (s.channels_last ? " to channels-last" : " to planar");
}

struct Data {
  Buffer<float> input, input_scale, scale, bias, inverse;
  Buffer<int32_t> zero_sum, zero_point;
  Buffer<int8_t> packed;
  std::vector<CodeRange> range;
  bool per_channel, has_bias;

  Data(Random& random, const ConvShape& s)
      : input(s.batch * s.sample_stride), input_scale(s.batch), scale(s.out_channels), bias(s.out_channels),
        inverse(s.channels), zero_sum(s.out_channels), zero_point(s.channels),
        packed(packed_bytes(s.out_channels, s.group_inputs(), s.kernel_h * s.kernel_w, s.groups)),
        per_channel(random.chance(30)), has_bias(random.chance(60)) {
    input.fill([&] { return random.value(); });
    if (random.chance(5)) input[random.between(0, input.size() - 1)] = __builtin_inff();
    input_scale.fill([&] { return random.unit(); });
    scale.fill([&] { return random.unit() * 0.01f; });
    bias.fill([&] { return random.around(2.0f); });
    zero_sum.fill([&] { return random.between(-100000, 100000); });
    inverse.fill([&] { return random.unit() * 60.0f + 1e-4f; });
    zero_point.fill([&] { return random.extreme(0, 255); });
    Buffer<int8_t> weight(s.out_channels * s.group_inputs() * s.kernel_h * s.kernel_w);
    weight.fill([&] { return random.extreme(-128, 127); });
    pack_weight(weight.data(), s.out_channels, s.group_inputs(), s.kernel_h * s.kernel_w, s.groups, packed.data());
    for (int64_t sample = 0; sample < s.batch; ++sample) {
      const auto zero = static_cast<float>(zero_point[0]);
      range.push_back({inverse[0], -zero, 255.0f - zero, zero_point[0]});
    }
  }
};

}  // namespace

void test_conv(Random& random) {
  const ConvShape s = random_shape(random);
  const Data data(random, s);
  const int64_t values = s.batch * s.out_channels * s.out_height * s.out_width;
  const DenseLayout layout = dense_layout(s);
  Buffer<uint8_t> zero_row(layout.row_pixels * layout.pixel_bytes);
  const bool fill_zero_row = data.per_channel && !s.depthwise();
  if (fill_zero_row) write_zero_row(s, data.zero_point.data(), zero_row.data());
  const int64_t threads = random.between(1, 3);
  same_on_every_tier(text(s), 4 * values + 1, [&](uint8_t* out) {
    Buffer<float> output(values);
    ConvCall call{};
    call.shape = s, call.input = data.input.data(), call.range = data.range.data();
    call.input_scale = data.input_scale.data(), call.packed = data.packed.data(), call.scale = data.scale.data();
    call.bias = data.has_bias ? data.bias.data() : nullptr, call.zero_sum = data.zero_sum.data();
    if (data.per_channel) call.channel_range = {data.inverse.data(), data.zero_point.data()};
    if (fill_zero_row) call.zero_row = zero_row.data();
    call.output = output.data(), call.kernels = &kConvTiers.active();
    const ConvPlan plan = plan_conv(s, *call.kernels, threads);
    uint32_t seen = 0;
    for (int64_t task = 0; task < plan.tasks(); ++task) {
      Buffer<uint8_t> scratch(plan.scratch_bytes);
      const uint32_t bits = (s.depthwise() ? depthwise_task : dense_task)(call, plan, task, scratch.data());
      seen = bits > seen ? bits : seen;
    }
    out[4 * values] = seen >= 0x7f800000u;
    if (seen < 0x7f800000u) std::memcpy(out, output.data(), static_cast<size_t>(4 * values));
  });

  const int64_t count = data.input.size();
  same_on_every_tier("magnitude_bits " + std::to_string(count), 4, [&](uint8_t* out) {
    const uint32_t bits = kConvTiers.active().magnitude_bits(data.input.data(), count, 0);
    std::memcpy(out, &bits, 4);
  });
}

}  // namespace narrowcast::test
