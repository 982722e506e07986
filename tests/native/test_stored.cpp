// Stored weights of every format to floats, and the quantizers that make them: scales, codes, packing.
#include "check.h"
#include "encode.h"
#include "stored_weight.h"

namespace narrowcast::test {
namespace {

constexpr int kBits[] = {2, 3, 4, 5, 6, 8};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

int64_t scale_bytes(ScaleType type) { return type == ScaleType::float32 ? 4 : type == ScaleType::float16 ? 2 : 1; }

}  // namespace

void test_expand(Random& random) {
  const int64_t rows = random.between(1, 4), columns = random.between(1, random.chance(30) ? 400 : 80);
  StoredWeight weight{};
  weight.bits = kBits[random.between(0, 5)], weight.columns = columns;
  weight.row_bytes = (columns * weight.bits + 7) / 8, weight.is_signed = weight.bits == 8 && random.chance(50);
  weight.group = random.chance(20) ? columns : random.between(1, 5) * 8;
  weight.scale_type = static_cast<ScaleType>(random.between(0, 2));
  const int64_t groups = (columns + weight.group - 1) / weight.group;
  weight.scale_stride = random.chance(20) ? 0 : groups;
  Buffer<uint8_t> codes(rows * weight.row_bytes), zero_point(rows * groups);
  Buffer<uint8_t> scale(rows * groups * scale_bytes(weight.scale_type));
  const bool own_levels = random.chance(50);
  const int64_t count_of_levels = int64_t{1} << weight.bits;
  Buffer<float> levels(own_levels ? rows * groups * count_of_levels : count_of_levels);
  Buffer<uint16_t> half_zeros(rows * groups);
  codes.fill([&] { return random.between(0, 255); });
  zero_point.fill([&] { return random.between(0, (1 << weight.bits) - 1); });
  levels.fill([&] { return random.around(1.0f); });
  for (int64_t index = 0; index < rows * groups; ++index) {
    store_float(half_zeros.data(), FloatType::float16, index, static_cast<float>(random.between(0, 255)) / 4.0f);
  }
  for (int64_t index = 0; index < rows * groups; ++index) {
    if (weight.scale_type == ScaleType::e8m0) scale[index] = static_cast<uint8_t>(random.between(100, 150));
    else store_float(scale.data(), weight.scale_type == ScaleType::float32 ? FloatType::float32 : FloatType::float16,
                     index, random.unit());
  }
  weight.codes = codes.data(), weight.scale = scale.data();
  weight.levels = random.chance(20) ? levels.data() : nullptr;
  weight.levels_stride = weight.levels != nullptr && own_levels ? groups * count_of_levels : 0;
  if (weight.levels == nullptr && random.chance(60)) {
    weight.zero_is_half = random.chance(50);
    weight.zero_point = weight.zero_is_half ? static_cast<const void*>(half_zeros.data()) : zero_point.data();
  }
  const int64_t row = random.between(0, rows - 1), begin = random.between(0, (columns - 1) / 8) * 8;
  const int64_t count = random.chance(50) ? columns - begin : random.between(0, columns - begin);
  const std::string what = "expand bits " + std::to_string(weight.bits) + " columns " + std::to_string(columns) +
                           " group " + std::to_string(weight.group) + " from " + std::to_string(begin) + " count " +
                           std::to_string(count);
  same_on_every_tier(what, 4 * count, [&](uint8_t* out) {
    kExpandTiers.active().expand(weight, row, begin, count, reinterpret_cast<float*>(out));
  });
}

void test_encode(Random& random) {
  const int64_t columns = random.between(1, random.chance(30) ? 300 : 70);
  const int64_t group = random.chance(20) ? columns : random.between(1, 40), groups = (columns + group - 1) / group;
  const int bits = kBits[random.between(0, 5)];
  const bool symmetric = random.chance(50);
  const auto half = static_cast<float>(1 << (bits - 1));
  const CodeBounds range{symmetric ? 1.0f - half : -half, half - 1.0f, symmetric,
                        static_cast<ScaleFormat>(random.between(0, 2))};
  Buffer<float> values(columns);
  values.fill([&] { return random.value(); });
  const std::string what = "encode bits " + std::to_string(bits) + " columns " + std::to_string(columns) + " group " +
                           std::to_string(group);
  const int64_t bytes = groups * 8 + columns + 16;
  same_on_every_tier(what, bytes, [&](uint8_t* out) {
    const EncodeKernels& kernels = kEncodeTiers.active();
    Buffer<float> scale(groups);
    Buffer<int32_t> zero_point(groups);
    Buffer<int8_t> codes(columns);
    if (symmetric) zero_point.fill([] { return 0; });
    int32_t* zeros = symmetric ? nullptr : zero_point.data();
    kernels.choose(values.data(), columns, group, range, scale.data(), zeros);
    kernels.encode(values.data(), columns, group, range, scale.data(), zeros, codes.data());
    double errors[2] = {0.0, 0.0};
    kernels.error(values.data(), codes.data(), columns, group, scale.data(), zeros, errors, errors + 1);
    std::memcpy(out, scale.data(), static_cast<size_t>(4 * groups));
    std::memcpy(out + 4 * groups, zero_point.data(), static_cast<size_t>(4 * groups));
    std::memcpy(out + 8 * groups, codes.data(), static_cast<size_t>(columns));
    std::memcpy(out + 8 * groups + columns, errors, 16);
  });

  if (bits == 8) return;  // bytes are stored as they are
  const int64_t count = round_up(columns, 8);
  Buffer<uint8_t> plain(count);
  const int offset = -(1 << (bits - 1));
  plain.fill([&] { return random.between(0, (1 << bits) - 1) + offset; });
  same_on_every_tier(what + " pack", count * bits / 8 + count, [&](uint8_t* out) {
    Buffer<uint8_t> packed(count * bits / 8);
    if (!kEncodeTiers.active().pack(plain.data(), count, bits, offset, packed.data())) report(what, "does not pack");
    std::memcpy(out, packed.data(), static_cast<size_t>(packed.size()));
    kEncodeTiers.active().unpack(packed.data(), count, bits, offset, out + packed.size());
    if (std::memcmp(out + packed.size(), plain.data(), static_cast<size_t>(count)) != 0) report(what, "unpack is not the inverse");
  });
}

}  // namespace narrowcast::test
