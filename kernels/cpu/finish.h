// How sums end: activations of W vectors side by side, to what the storage type T keeps, and bfloat16 by one instruction
// each way. W chains of a dozen instructions that wait for each other fill the units where one would leave them idle.
// AVX-512 scales by powers of two and guesses reciprocals to 2^-14: enough for a two-byte T as it is, and for float after
// one step of Newton's.
#pragma once
#include "simd.h"

namespace sdxl {
namespace ARCH {
namespace {

// step(i) for the W vectors, unrolled.
template <int W, class F> inline void side_by_side(F &&step) {
#pragma GCC unroll 8
  for (int i = 0; i < W; i++) step(i);
}

#if defined(ARCH_avx512)
// These write subnormal results as zero.
inline vf load(const bf16 *p) { return vf(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16)); }
inline void store(bf16 *p, vf x) { _mm256_storeu_si256((__m256i *)p, (__m256i)_mm512_cvtneps_pbh(__m512(x))); }
inline vf load(const bf16 *p, int64_t count) { return count >= LANES ? load(p) : load<bf16>(p, count); }
inline void store(bf16 *p, vf x, int64_t count) { count >= LANES ? store(p, x) : store<bf16>(p, x, count); }

// 2^x, to 1e-4 relative for a two-byte T and to 2e-7 for float: scalef rounds its exponent down itself.
template <class T, int W> inline void powers_of_two(vf (&x)[W]) {
  vf p[W], r[W];
  if constexpr (sizeof(T) == 2) {
    side_by_side<W>([&](int i) { r[i] = vf(_mm512_reduce_ps(__m512(x[i]), _MM_FROUND_TO_NEG_INF)); });
    side_by_side<W>([&](int i) { p[i] = r[i] * 0.07706705f + 0.22764499f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * r[i] + 0.69511679f; });
  } else {
    side_by_side<W>([&](int i) { r[i] = vf(_mm512_reduce_ps(__m512(x[i]), _MM_FROUND_TO_NEAREST_INT)); });
    side_by_side<W>([&](int i) { x[i] -= r[i]; });
    side_by_side<W>([&](int i) { p[i] = r[i] * 1.3333558e-3f + 9.6181291e-3f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * r[i] + 5.5504109e-2f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * r[i] + 2.4022651e-1f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * r[i] + 6.9314718e-1f; });
  }
  side_by_side<W>([&](int i) { p[i] = p[i] * r[i] + 1.f; });
  side_by_side<W>([&](int i) { x[i] = vf(_mm512_scalef_ps(__m512(p[i]), __m512(x[i]))); });
}

// x[i] *= 1 / d[i]
template <class T, int W> inline void divide(vf (&x)[W], const vf (&d)[W]) {
  vf r[W];
  side_by_side<W>([&](int i) { r[i] = vf(_mm512_rcp14_ps(__m512(d[i]))); });
  side_by_side<W>([&](int i) { x[i] *= r[i]; });
  if constexpr (sizeof(T) == 4) side_by_side<W>([&](int i) { x[i] *= 2.f - d[i] * r[i]; });
}
#endif

// x / (1 + e^-x)
template <class T, int W> inline void silu(vf (&x)[W]) {
#if defined(ARCH_avx512)
  vf d[W];
  side_by_side<W>([&](int i) { d[i] = x[i] * -1.44269504f; });
  // Newton's step would make NaN of an infinite power.
  if constexpr (sizeof(T) == 4) side_by_side<W>([&](int i) { d[i] = vf(_mm512_min_ps(__m512(d[i]), __m512(splat(126.f)))); });
  powers_of_two<T>(d);
  side_by_side<W>([&](int i) { d[i] += 1.f; });
  divide<T>(x, d);
#else
  for (vf &each : x) each *= sigmoid(each);
#endif
}

// x Phi(x). Two-byte types take the tail of Phi as e^(-x^2/2) times a polynomial without constant in t = 1 / (1 + 0.37 |x|),
// fitted on [0, 8] to 2e-5 relative.
template <class T, int W> inline void gelu(vf (&x)[W]) {
#if defined(ARCH_avx512)
  if constexpr (sizeof(T) == 2) {
    vf t[W], e[W], p[W];
    side_by_side<W>([&](int i) { t[i] = vf(_mm512_rcp14_ps(_mm512_abs_ps(__m512(x[i])) * 0.37f + 1.f)); });
    side_by_side<W>([&](int i) { e[i] = vf(_mm512_max_ps(__m512(x[i] * x[i] * -0.72134752f), __m512(splat(-150.f)))); });
    powers_of_two<T>(e);
    side_by_side<W>([&](int i) { p[i] = t[i] * -0.09302874f + 0.21613391f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * t[i] + 0.07109469f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * t[i] + 0.15906601f; });
    side_by_side<W>([&](int i) { p[i] = p[i] * t[i] + 0.14672484f; });
    side_by_side<W>([&](int i) { p[i] *= t[i] * e[i]; });
    side_by_side<W>([&](int i) { x[i] *= x[i] < 0.f ? p[i] : 1.f - p[i]; });
    return;
  }
#endif
  for (vf &each : x) each = gelu(each);
}

} // namespace
} // namespace ARCH
} // namespace sdxl
