// Weight-only dequantization of rows.
#include "check.h"
#include "dequantize.h"
#include "float_types.h"

namespace narrowcast::test {

void test_dequantize(Random& random) {
  const int64_t columns = random.between(0, 300);
  Buffer<int8_t> codes(columns);
  codes.fill([&] { return random.extreme(-128, 127); });
  const auto zero_point = static_cast<int32_t>(random.extreme(-128, 127));
  const float scale = random.unit();
  same_on_every_tier("dequantize int8_row " + std::to_string(columns), columns * 4, [&](uint8_t* out) {
    kDequantizeTiers.active().int8_row(codes.data(), scale, zero_point, columns, reinterpret_cast<float*>(out));
  });

  const int64_t group = random.chance(20) ? (columns > 0 ? columns : 1) : 2 * random.between(1, 40);
  const int64_t groups = (columns + group - 1) / group;
  Buffer<uint8_t> packed((columns + 1) / 2), zero_points(groups);
  Buffer<uint16_t> scales(groups);
  packed.fill([&] { return random.between(0, 255); });
  zero_points.fill([&] { return random.between(0, 15); });
  scales.fill([&] { return float_to_half(random.around(2.0f)); });
  const uint8_t* zeros = random.chance(50) ? zero_points.data() : nullptr;
  same_on_every_tier("dequantize int4_row " + std::to_string(columns), columns * 4, [&](uint8_t* out) {
    kDequantizeTiers.active().int4_row(packed.data(), scales.data(), zeros, group, columns,
                                       reinterpret_cast<float*>(out));
  });
}

}  // namespace narrowcast::test
