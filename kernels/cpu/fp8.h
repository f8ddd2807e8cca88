// 8-bit floats, e4m3 (Micikevicius et al. 2022): four bits of exponent with bias 7, three of mantissa, up to 448, no infinities;
// 0x7f and 0xff are NaN. Bits are moved by hand, the same way on every device.
#pragma once
#include "simd.h"

namespace sdxl {
namespace ARCH {
namespace {

constexpr float LARGEST = 448;

// The nearest byte, ties to even; what is larger than 448 becomes 448.
inline uint8_t to_e4m3(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint8_t sign = uint8_t(bits >> 24 & 0x80);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return 0x7f;
  float a;
  memcpy(&a, &bits, 4);
  if (a >= LARGEST) return uint8_t(sign | 0x7e);
  if (a < 0.015625f) { // below 2^-6 in steps of 2^-9: adding 2^14 leaves them in the last bits
    const float moved = a + 16384.f;
    memcpy(&bits, &moved, 4);
    return uint8_t(sign | (bits & 0xf));
  }
  bits += 0x7ffff + (bits >> 20 & 1);
  return uint8_t(sign | ((bits >> 20) - (120 << 3)));
}

inline float from_e4m3(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return __builtin_nanf("");
  const uint32_t magnitude = code & 0x7f;
  // As a float of the same exponent field, 120 too small: 2^120 brings subnormals out right as well.
  const uint32_t bits = uint32_t(code & 0x80) << 24 | magnitude << 20;
  float x;
  memcpy(&x, &bits, 4);
  return x * 0x1p120f;
}

} // namespace
} // namespace ARCH
} // namespace sdxl
