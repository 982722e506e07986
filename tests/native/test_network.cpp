// The kernels of integer networks beside convolution: epilogues, pools, additions, dequantization, on codes and floats.
#include "check.h"
#include "network_kernels.h"

namespace narrowcast::test {
namespace {

constexpr int64_t kSlack = 64;  // codes are read a vector at a time

std::string text(const char* kernel, int64_t channels, int64_t pixels) {
  return std::string("network ") + kernel + " channels " + std::to_string(channels) + " pixels " + std::to_string(pixels);
}

// Pixels of codes or floats, one after the other.
struct Pixels {
  int64_t step;
  bool coded;
  Buffer<uint8_t> bytes;

  Pixels(Random& random, int64_t count, int64_t channels, bool coded)
      : step(coded ? (channels + 3) / 4 * 4 : 4 * channels), coded(coded), bytes(count * step + (coded ? kSlack : 0)) {
    for (int64_t index = 0; index < bytes.size(); ++index) bytes[index] = static_cast<uint8_t>(random.extreme(0, 255));
    if (coded) return;
    for (int64_t index = 0; index < count * channels; ++index) {
      const float value = random.value();
      std::memcpy(bytes.data() + 4 * index, &value, 4);
    }
  }
};

// The constants of `channels` channels.
struct Tail {
  Buffer<float> low, high, inverse, zero;
  FinishTail terms{};

  Tail(Random& random, int64_t channels, bool late, bool coded)
      : low(channels), high(channels), inverse(channels), zero(channels) {
    const bool rectified = random.chance(50);
    for (int64_t c = 0; c < channels; ++c) {
      zero[c] = static_cast<float>(random.extreme(0, 255));
      inverse[c] = random.unit() * 30.0f;
      low[c] = coded ? (rectified ? zero[c] : 0.0f) : rectified ? 0.0f : -__builtin_inff();
      high[c] = coded ? 255.0f : rectified ? 6.0f : __builtin_inff();
    }
    terms = {low.data(), high.data(), late ? inverse.data() : nullptr, late ? zero.data() : nullptr,
             late ? static_cast<Activation>(random.between(0, 3)) : Activation::none, coded};
  }
};

struct Size {
  int64_t channels, pixels;
  bool late, target_coded, copies;

  explicit Size(Random& random)
      : channels(random.between(1, random.chance(30) ? 80 : 20)), pixels(random.between(1, 20)),
        late(random.chance(50)), target_coded(random.chance(70)), copies(late && random.chance(50)) {}

  int64_t target_step() const { return target_coded ? (channels + 3) / 4 * 4 : 4 * channels; }
  int64_t target_bytes() const { return pixels * target_step(); }
  int64_t out_bytes() const { return target_bytes() + pixels * 4 * channels; }
};

void test_finish(Random& random) {
  const Size size(random);
  const int64_t stride = (size.channels + 15) / 16 * 16;
  Buffer<int32_t> sums(size.pixels * stride);
  Buffer<float> multiplier(size.channels), offset(size.channels), second_multiplier(size.channels);
  sums.fill([&] { return random.between(-200000, 200000); });
  multiplier.fill([&] { return random.unit() * 1e-3f; });
  offset.fill([&] { return random.around(100.0f); });
  second_multiplier.fill([&] { return random.around(2.0f); });
  const Tail tail(random, size.channels, size.late, size.target_coded);
  const Pixels second(random, size.pixels, size.channels, random.chance(50));
  const bool adds = random.chance(50);
  same_on_every_tier(text("finish", size.channels, size.pixels), size.out_bytes(), [&](uint8_t* out) {
    std::vector<uint8_t*> target, floats;
    std::vector<const uint8_t*> added;
    for (int64_t p = 0; p < size.pixels; ++p) {
      target.push_back(out + p * size.target_step());
      floats.push_back(out + size.target_bytes() + p * 4 * size.channels);
      added.push_back(second.bytes.data() + p * second.step);
    }
    const FinishBlock block{sums.data(),   stride,       size.pixels, size.channels, target.data(),
                            added.data(), size.copies ? floats.data() : nullptr,    0,           0,             0};
    const FinishTerms terms{multiplier.data(), offset.data(), adds ? second_multiplier.data() : nullptr, second.coded,
                            tail.terms};
    kNetworkTiers.active().finish(block, terms);
  });
}

void test_add(Random& random) {
  const Size size(random);
  Buffer<float> multiplier(size.channels), second_multiplier(size.channels), offset(size.channels);
  multiplier.fill([&] { return random.around(2.0f); });
  second_multiplier.fill([&] { return random.around(2.0f); });
  offset.fill([&] { return random.around(100.0f); });
  const Pixels source(random, size.pixels, size.channels, random.chance(50));
  const Pixels second(random, size.pixels, size.channels, random.chance(50));
  const Tail tail(random, size.channels, size.late, size.target_coded);
  same_on_every_tier(text("add", size.channels, size.pixels), size.out_bytes(), [&](uint8_t* out) {
    AddRow row{};
    row.source = source.bytes.data(), row.source_step = source.step, row.source_coded = source.coded;
    row.second = second.bytes.data(), row.second_step = second.step, row.second_coded = second.coded;
    row.target = out, row.target_step = size.target_step();
    row.floats = size.copies ? out + size.target_bytes() : nullptr, row.floats_step = 4 * size.channels;
    row.pixels = size.pixels, row.channels = size.channels;
    row.multiplier = multiplier.data(), row.second_multiplier = second_multiplier.data(), row.offset = offset.data();
    kNetworkTiers.active().add(row, tail.terms);
  });
}

void test_pools(Random& random) {
  const int64_t channels = random.between(1, 70), rows = random.between(1, 4), columns = random.between(1, 4);
  const Pixels codes(random, rows * columns, channels, true), floats(random, rows * columns, channels, false);
  const auto window = [&](const Pixels& pixels) {
    return PoolWindow{pixels.bytes.data(), rows, columns, columns * pixels.step, pixels.step};
  };
  same_on_every_tier(text("max_codes", channels, rows * columns), channels, [&](uint8_t* out) {
    kNetworkTiers.active().max_codes(window(codes), channels, out);
  });
  same_on_every_tier(text("max_floats", channels, rows * columns), 4 * channels, [&](uint8_t* out) {
    kNetworkTiers.active().max_floats(window(floats), channels, reinterpret_cast<float*>(out));
  });
  Buffer<float> multiplier(channels), offset(channels), outside(channels);
  multiplier.fill([&] { return random.around(2.0f); });
  offset.fill([&] { return random.around(100.0f); });
  outside.fill([&] { return random.between(0, 255); });
  const bool source_coded = random.chance(50), target_coded = random.chance(50);
  const Tail tail(random, channels, false, target_coded);
  const AverageTerms terms{multiplier.data(), offset.data(), tail.low.data(), tail.high.data(),
                           random.chance(50) ? outside.data() : nullptr, static_cast<float>(random.between(0, 9)),
                           1.0f / static_cast<float>(random.between(1, 16)), source_coded, target_coded};
  same_on_every_tier(text("average", channels, rows * columns), (target_coded ? 1 : 4) * channels, [&](uint8_t* out) {
    kNetworkTiers.active().average(window(source_coded ? codes : floats), channels, terms, out);
  });
}

void test_dequantize_pixels(Random& random) {
  const int64_t channels = random.between(1, 70), pixels = random.between(1, 9);
  const Pixels codes(random, pixels, channels, true);
  Buffer<float> scale(channels), zero(channels);
  scale.fill([&] { return random.unit(); });
  zero.fill([&] { return random.between(0, 255); });
  same_on_every_tier(text("dequantize", channels, pixels), 4 * channels * pixels, [&](uint8_t* out) {
    kNetworkTiers.active().dequantize(codes.bytes.data(), codes.step, reinterpret_cast<float*>(out), 4 * channels,
                                      pixels, channels, scale.data(), zero.data());
  });
}

}  // namespace

void test_network(Random& random) {
  test_finish(random);
  test_add(random);
  test_pools(random);
  test_dequantize_pixels(random);
}

}  // namespace narrowcast::test
