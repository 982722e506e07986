// Fields of 2 to 6 bits to bytes and back, eight at a time in one 64-bit word; every tier compiles it for itself.
#pragma once

#include <stdint.h>
#include <string.h>

namespace narrowcast {
namespace {

typedef uint8_t Byte8 __attribute__((vector_size(8)));

// Eight fields, one per byte, moved together in three doublings: bytes to pairs, pairs to fours, fours to one.
__attribute__((always_inline)) inline uint64_t squeeze(uint64_t fields, int bits) {
  fields = (fields & 0x00ff00ff00ff00ffull) | ((fields & 0xff00ff00ff00ff00ull) >> (8 - bits));
  fields = (fields & 0x0000ffff0000ffffull) | ((fields & 0xffff0000ffff0000ull) >> (16 - 2 * bits));
  return (fields & 0x00000000ffffffffull) | ((fields & 0xffffffff00000000ull) >> (32 - 4 * bits));
}

__attribute__((always_inline)) inline uint64_t spread(uint64_t packed, int bits) {
  const uint64_t four = (1ull << 4 * bits) - 1, two = (1ull << 2 * bits) - 1, one = (1ull << bits) - 1;
  packed = (packed & four) | ((packed & (four << 4 * bits)) << (32 - 4 * bits));
  packed = (packed & (two * 0x0000000100000001ull)) | ((packed & ((two << 2 * bits) * 0x0000000100000001ull)) << (16 - 2 * bits));
  return (packed & (one * 0x0001000100010001ull)) | ((packed & ((one << bits) * 0x0001000100010001ull)) << (8 - bits));
}

template <int bits>
inline bool pack_bits(const uint8_t* codes, int64_t count, int offset, uint8_t* packed) {
  const uint64_t unused = 0x0101010101010101ull * static_cast<uint64_t>(256 - (1 << bits));
  uint64_t outside = 0;
  for (int64_t at = 0; at < count; at += 8, packed += bits) {
    Byte8 eight;
    memcpy(&eight, codes + at, 8);
    eight -= static_cast<uint8_t>(offset);
    uint64_t fields;
    memcpy(&fields, &eight, 8);
    outside |= fields & unused;
    const uint64_t joined = squeeze(fields, bits);
    memcpy(packed, &joined, bits);
  }
  return outside == 0;
}

template <int bits>
inline void unpack_bits(const uint8_t* packed, int64_t count, int offset, uint8_t* codes) {
  for (int64_t at = 0; at < count; at += 8, packed += bits) {
    uint64_t joined = 0;
    memcpy(&joined, packed, bits);
    const uint64_t fields = spread(joined, bits);
    Byte8 eight;
    memcpy(&eight, &fields, 8);
    eight += static_cast<uint8_t>(offset);
    memcpy(codes + at, &eight, 8);
  }
}

// One instance per width: every shift is then a constant and `bits` bytes are copied without a call.
inline bool pack_fields(const uint8_t* codes, int64_t count, int bits, int offset, uint8_t* packed) {
  switch (bits) {
    case 2: return pack_bits<2>(codes, count, offset, packed);
    case 3: return pack_bits<3>(codes, count, offset, packed);
    case 4: return pack_bits<4>(codes, count, offset, packed);
    case 5: return pack_bits<5>(codes, count, offset, packed);
    default: return pack_bits<6>(codes, count, offset, packed);
  }
}

inline void unpack_fields(const uint8_t* packed, int64_t count, int bits, int offset, uint8_t* codes) {
  switch (bits) {
    case 2: return unpack_bits<2>(packed, count, offset, codes);
    case 3: return unpack_bits<3>(packed, count, offset, codes);
    case 4: return unpack_bits<4>(packed, count, offset, codes);
    case 5: return unpack_bits<5>(packed, count, offset, codes);
    default: return unpack_bits<6>(packed, count, offset, codes);
  }
}

}  // namespace
}  // namespace narrowcast
