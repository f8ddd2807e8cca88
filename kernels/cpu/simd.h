// Conversions between the storage types and float, and the scalar functions that kernels share. Loops over these are
// written so that the compiler vectorises them for the instruction set of the file being compiled: branch-free, float32.
#pragma once
#include "abi.h"

#include <cmath>

namespace sdxl {
namespace ARCH {
namespace {

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  memcpy(&out, &bits, 4);
  return out;
}

inline float to_float(f16 x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return float(half);
}

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }

// Nearest even; NaN stays a quiet NaN.
template <> inline bf16 from_float<bf16>(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return bf16{uint16_t((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded)};
}

template <> inline f16 from_float<f16>(float x) {
  const _Float16 half = _Float16(x);
  f16 out;
  memcpy(&out.bits, &half, 2);
  return out;
}

// e^x to about 2 ulp, saturating: 2^n times a degree-6 polynomial on [-ln2/2, ln2/2] (Cephes' expf coefficients).
inline float fast_exp(float x) {
  x = x > 88.f ? 88.f : x;
  x = x < -87.f ? -87.f : x;
  const float n = __builtin_floorf(x * 1.44269504f + 0.5f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return p * scale;
}

inline float sigmoid(float x) { return 1.f / (1.f + fast_exp(-x)); }
inline float gelu_cdf(float x) { return 0.5f * (1.f + erff(x * 0.70710678118f)); }
inline float gelu_density(float x) { return 0.3989422804f * fast_exp(-0.5f * x * x); }

// The work below which a second thread costs more than it brings.
constexpr int64_t GRAIN = 16384;

} // namespace
} // namespace ARCH
} // namespace sdxl
