// One float vector per instruction set (vf: 16, 8 or 4 lanes), its loads and stores for the three storage types, and the
// functions that kernels share. vf is a GNU vector: + - * / < ?: work on it, also against a float, and a * b + c becomes
// one fma where there is one. A function over V takes a vf or a float and computes the same bits for both.
// bfloat16 rounds by integer code on every CPU, so that subnormals and NaN survive as they do in PyTorch. The zero-masked
// forms of AVX-512's half conversions are full ones: gcc 12 warns, wrongly, of the plain forms.
#pragma once
#include "abi.h"

#include <cmath>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace sdxl {
namespace ARCH {
namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));

// The integers of a V's own shape, for bit work.
template <class V> struct Bits;
template <> struct Bits<float> {
  typedef int32_t i;
  typedef uint32_t u;
};
template <> struct Bits<vf> {
  typedef vi i;
  typedef vu u;
};

template <class To, class From> inline To bit_cast(From x) { return __builtin_bit_cast(To, x); }

inline vf splat(float x) { return vf{} + x; }

// ---- storage <-> float ----

template <class V> inline typename Bits<V>::u bf16_bits(V x) {
  typedef typename Bits<V>::u U;
  const U bits = bit_cast<U>(x);
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded;
}

// Half to float by exponent shift: x 2^112 rebuilds normals and subnormals alike; only inf and NaN need their exponent set.
template <class V, class U> inline V half_value(U half) {
  const U magnitude = (half & 0x7fffu) << 13;
  const U scaled = bit_cast<U>(bit_cast<V>(magnitude) * 0x1p112f);
  const U bits = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : scaled;
  return bit_cast<V>(bits | ((half & 0x8000u) << 16));
}

// Float to half, nearest even. Below 2^-14 adding 0.5 leaves the rounded subnormal in the low bits of the sum.
template <class V> inline typename Bits<V>::u half_bits(V x) {
  typedef typename Bits<V>::u U;
  const U bits = bit_cast<U>(x);
  const U magnitude = bits & 0x7fffffffu;
  const U small = bit_cast<U>(bit_cast<V>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const U large = magnitude > 0x7f800000u ? ((magnitude >> 13) & 0x3ffu) | 0x7e00u : (magnitude & 0u) + 0x7c00u;
  const U finite = magnitude < 0x38800000u ? small : normal;
  return (magnitude >= 0x477ff000u ? large : finite) | ((bits >> 16) & 0x8000u);
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
inline float to_float(f16 x) { return half_value<float>(uint32_t(x.bits)); }

template <class T> T from_float(float x);
template <> inline float from_float<float>(float x) { return x; }
template <> inline bf16 from_float<bf16>(float x) { return bf16{uint16_t(bf16_bits(x))}; }
template <> inline f16 from_float<f16>(float x) { return f16{uint16_t(half_bits(x))}; }

inline vf widen(const float *p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline vf widen(const bf16 *p) {
  vh x;
  memcpy(&x, p, sizeof x);
  return bit_cast<vf>(__builtin_convertvector(x, vu) << 16);
}

inline vf widen(const f16 *p) {
  vh x;
  memcpy(&x, p, sizeof x);
#if defined(__AVX512F__)
  return vf(_mm512_maskz_cvtph_ps(0xffff, __m256i(x)));
#elif defined(__F16C__)
  return vf(_mm256_cvtph_ps(__m128i(x)));
#else
  return half_value<vf>(__builtin_convertvector(x, vu));
#endif
}

inline void narrow(float *p, vf x) { memcpy(p, &x, sizeof x); }

inline void narrow(bf16 *p, vf x) {
  const vh out = __builtin_convertvector(bf16_bits(x), vh);
  memcpy(p, &out, sizeof out);
}

inline void narrow(f16 *p, vf x) {
#if defined(__AVX512F__)
  const vh out = vh(_mm512_maskz_cvtps_ph(0xffff, __m512(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  const vh out = vh(_mm256_cvtps_ph(__m256(x), _MM_FROUND_TO_NEAREST_INT));
#else
  const vh out = __builtin_convertvector(half_bits(x), vh);
#endif
  memcpy(p, &out, sizeof out);
}

template <class T> inline vf load(const T *p) { return widen(p); }
template <class T> inline void store(T *p, vf x) { narrow(p, x); }

// The first `count` lanes (the rest read as 0, and are not written); nothing beyond them is touched.
template <class T> inline vf load(const T *p, int64_t count) {
  if (count >= LANES) return widen(p);
  T lanes[LANES] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = p[i];
  return widen(lanes);
}

template <class T> inline void store(T *p, vf x, int64_t count) {
  if (count >= LANES) return narrow(p, x);
  T lanes[LANES];
  narrow(lanes, x);
  for (int64_t i = 0; i < count; i++) p[i] = lanes[i];
}

// ---- arithmetic ----

inline vf max(vf a, vf b) { return a > b ? a : b; }

inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline vf sqrt(vf x) {
  for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

// Halves added to halves: the same tree on every run.
inline float reduce_add(vf x) {
  float lanes[LANES];
  memcpy(lanes, &x, sizeof x);
  for (int half = LANES / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

inline float reduce_max(vf x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

// e^x to 2e-7 relative, 0 and inf past either end: 2^n times a degree 6 polynomial on |r| <= ln2 / 2 (Cephes' expf).
// 2^n goes on in two halves, so that subnormal results and those above 2^127 come out right.
template <class V> inline V fast_exp(V x) {
  typedef typename Bits<V>::i I;
  x = x > 89.f ? V{} + 89.f : x;
  x = x < -104.f ? V{} - 104.f : x;
  const V shifted = x * 1.44269504f + 12582912.f; // rounds to an integer in the low bits
  const V n = shifted - 12582912.f;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const I power = bit_cast<I>(shifted) - 0x4b400000, half = power >> 1;
  return p * bit_cast<V>((half + 127) << 23) * bit_cast<V>((power - half + 127) << 23);
}

template <class V> inline V sigmoid(V x) { return 1.f / (1.f + fast_exp(-x)); }

// erfc(z) for z >= 0 as t exp(-z^2 + P(t)), t = 1 / (1 + z/2): the form of Numerical Recipes' erfcc, P fitted on [0, 1].
template <class V> inline V erfc_of(V z) {
  const V t = 1.f / (1.f + 0.5f * z);
  V p = t * -0.178757243f + 0.991357595f;
  p = p * t - 2.20510749f;
  p = p * t + 2.39873372f;
  p = p * t - 1.22542516f;
  p = p * t + 0.335540222f;
  p = p * t - 0.233707888f;
  p = p * t - 0.0747341949f;
  p = p * t + 0.0825924333f;
  p = p * t + 0.375020199f;
  p = p * t + 0.999999927f;
  p = p * t - 1.26551212f;
  return t * fast_exp(p - z * z);
}

// The normal distribution's Phi(x) and its density: gelu(x) = x Phi(x).
template <class V> inline V gelu_cdf(V x) {
  const V tail = 0.5f * erfc_of((x < 0.f ? -x : x) * 0.70710678f);
  return x < 0.f ? tail : 1.f - tail;
}
template <class V> inline V gelu_density(V x) { return 0.3989422804f * fast_exp(-0.5f * x * x); }
template <class V> inline V gelu(V x) { return x * gelu_cdf(x); }

// Cephes' tanhf: a polynomial where 1 - 2 / (e^2x + 1) would cancel.
template <class V> inline V fast_tanh(V x) {
  const V s = x * x;
  V p = s * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * s - 5.37397155531e-2f;
  p = p * s + 1.33314422036e-1f;
  p = p * s - 3.33332819422e-1f;
  const V large = 1.f - 2.f / (fast_exp(2.f * x) + 1.f);
  return s < 0.390625f ? p * s * x + x : large;
}

// The work below which a second thread costs more than it brings; a multiple of every LANES.
constexpr int64_t GRAIN = 16384;

// How many rows of `width` make that much work.
inline int64_t rows_per_range(int64_t width) { return 1 + GRAIN / (width + 1); }

} // namespace
} // namespace ARCH
} // namespace sdxl
