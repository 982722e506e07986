// What the native tests share: random data, memory of exactly the size asked for, and the comparison of tiers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"

extern "C" {
const char* narrowcast_isa();
const char* narrowcast_isa_missing(const char* name);
int narrowcast_set_isa(const char* name);
}

namespace narrowcast::test {

// A small deterministic generator, the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}

  uint32_t bits() {
    state_ ^= state_ << 13, state_ ^= state_ >> 7, state_ ^= state_ << 17;
    return static_cast<uint32_t>(state_ >> 32);
  }
  // Both ends included.
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1)); }
  bool chance(int percent) { return between(0, 99) < percent; }
  float unit() { return static_cast<float>(bits() >> 8) * 0x1p-24f; }
  float around(float size) { return (unit() * 2.0f - 1.0f) * size; }
  // Mostly ordinary, now and then zero, tiny or large.
  float value() {
    switch (between(0, 15)) {
      case 0: return 0.0f;
      case 1: return -0.0f;
      case 2: return around(1e-41f);
      case 3: return around(3e4f);
      default: return around(4.0f);
    }
  }
  // An integer in low..high, often one of the two ends.
  int64_t extreme(int64_t low, int64_t high) { return chance(30) ? (chance(50) ? low : high) : between(low, high); }

 private:
  uint64_t state_;
};

// Heap memory that ends exactly behind the last element, so that a sanitizer sees a read beyond it.
template <class Type>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, static_cast<size_t>(count > 0 ? count : 1) * sizeof(Type)) != 0) std::abort();
    data_ = static_cast<Type*>(data);
    std::memset(data, 0xa5, static_cast<size_t>(count > 0 ? count : 1) * sizeof(Type));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  Type* data() { return data_; }
  const Type* data() const { return data_; }
  int64_t size() const { return count_; }
  Type& operator[](int64_t index) { return data_[index]; }
  const Type& operator[](int64_t index) const { return data_[index]; }

  template <class Make>
  Buffer& fill(const Make& make) {
    for (int64_t index = 0; index < count_; ++index) data_[index] = static_cast<Type>(make());
    return *this;
  }

 private:
  Type* data_ = nullptr;
  int64_t count_;
};

// Names of the tiers that run here; the first is scalar.
const std::vector<std::string>& tiers();

// Counts a failure and prints the first of them.
void report(const std::string& what, const std::string& message);
int failures();

// Runs body(output) on every tier and reports where a tier's bytes are not those of the scalar tier. The body writes
// `bytes` bytes, all of them or the same ones on every tier.
template <class Body>
void same_on_every_tier(const std::string& what, int64_t bytes, const Body& body) {
  Buffer<uint8_t> expected(bytes);
  for (const std::string& tier : tiers()) {
    if (narrowcast_set_isa(tier.c_str()) != 0) std::abort();
    if (tier == "scalar") {
      body(expected.data());
      continue;
    }
    Buffer<uint8_t> found(bytes);
    body(found.data());
    for (int64_t index = 0; index < bytes; ++index) {
      if (found[index] == expected[index]) continue;
      report(what, tier + " differs from scalar first at byte " + std::to_string(index) + " of " + std::to_string(bytes));
      break;
    }
  }
}

void test_quantize(Random& random);
void test_linear_int8(Random& random);
void test_linear_lowbit(Random& random);
void test_interleaved(Random& random);
void test_expand(Random& random);
void test_encode(Random& random);
void test_conv(Random& random);
void test_recurrent(Random& random);
void test_network(Random& random);

}  // namespace narrowcast::test
