// Activation quantizers: every element type, any length, extreme ranges, values that are not finite.
#include "check.h"
#include "float_types.h"
#include "quantize.h"

namespace narrowcast::test {
namespace {

constexpr uint32_t kSpecials[] = {0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc00000u, 0x7f800001u};

void fill_values(Random& random, FloatType type, int64_t count, bool finite, Buffer<uint8_t>& data) {
  for (int64_t index = 0; index < count; ++index) store_float(data.data(), type, index, random.value());
  if (!finite && count > 0) {
    const float special = bits_to_float(kSpecials[random.between(0, 4)]);
    store_float(data.data(), type, random.between(0, count - 1), special);
  }
}

std::string name(const char* kernel, FloatType type, int64_t count) {
  return std::string("quantize ") + kernel + " type " + std::to_string(static_cast<int>(type)) + " count " +
         std::to_string(count);
}

void test_ranges(const void* x, FloatType type, int64_t count, bool finite) {
  same_on_every_tier(name("absmax_bits", type, count), 1, [&](uint8_t* out) {
    const uint32_t bits = kQuantizeTiers.active().absmax_bits(x, type, count);
    out[0] = bits >= kNonFiniteBits;
  });
  if (finite) {
    same_on_every_tier(name("absmax_bits", type, count), 4, [&](uint8_t* out) {
      const uint32_t bits = kQuantizeTiers.active().absmax_bits(x, type, count);
      std::memcpy(out, &bits, 4);
    });
  }
  same_on_every_tier(name("range", type, count), 9, [&](uint8_t* out) {
    float bounds[2];
    out[8] = kQuantizeTiers.active().range(x, type, count, bounds, bounds + 1);
    if (finite) std::memcpy(out, bounds, 8);
  });
}

}  // namespace

void test_quantize(Random& random) {
  const auto type = static_cast<FloatType>(random.between(0, 2));
  const int64_t count = random.between(0, random.chance(20) ? 600 : 80);
  const bool finite = random.chance(85);
  Buffer<uint8_t> x(count * float_bytes(type));
  fill_values(random, type, count, finite, x);
  test_ranges(x.data(), type, count, finite || count == 0);

  const float inverse = random.chance(20) ? 1e30f : random.unit() * 100.0f + 1e-6f;
  const auto zero_point = static_cast<int32_t>(random.extreme(0, 255));
  same_on_every_tier(name("to_uint8", type, count), count + 1, [&](uint8_t* out) {
    Buffer<uint8_t> codes(count);
    out[count] = kQuantizeTiers.active().to_uint8(x.data(), type, count, inverse, zero_point, codes.data());
    if (finite) std::memcpy(out, codes.data(), static_cast<size_t>(count));
  });

  Buffer<float> inverses(count);
  Buffer<int32_t> zero_points(count);
  inverses.fill([&] { return random.unit() * 100.0f + 1e-6f; });
  zero_points.fill([&] { return random.extreme(0, 255); });
  same_on_every_tier(name("to_uint8_channels", type, count), count + 1, [&](uint8_t* out) {
    Buffer<uint8_t> codes(count);
    out[count] = kQuantizeTiers.active().to_uint8_channels(x.data(), type, count, inverses.data(), zero_points.data(),
                                                           codes.data());
    if (finite) std::memcpy(out, codes.data(), static_cast<size_t>(count));
  });

  const int64_t groups = (count + kActivationGroup - 1) / kActivationGroup;
  same_on_every_tier(name("to_uint8_groups", type, count), groups * 36 + 1, [&](uint8_t* out) {
    Buffer<uint8_t> codes(groups * kActivationGroup);
    Buffer<float> scales(groups);
    out[groups * 36] = kQuantizeTiers.active().to_uint8_groups(x.data(), type, count, codes.data(), scales.data());
    if (!finite) return;
    std::memcpy(out, codes.data(), static_cast<size_t>(groups * 32));
    std::memcpy(out + groups * 32, scales.data(), static_cast<size_t>(groups * 4));
  });
}

}  // namespace narrowcast::test
