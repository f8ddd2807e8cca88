// The micro-kernel: up to MR rows of A times one panel of B, sums kept in registers. A is read where it lies, row by row
// (rows `stride` words apart, k along a row) or k-major (`stride` words from one k to the next); B is a packed panel
// [words][vectors * LANES]. A word is a float or two bfloat16 for the dot product instruction.
#pragma once
#include "simd.h"

#include <utility>
#if defined(ARCH_avx512)
#include <immintrin.h>
#endif

namespace sdxl::ARCH {
namespace {

#if defined(ARCH_avx512)
constexpr int MR = 14;
constexpr int WIDE_MR = 9;
#else
constexpr int MR = 6;
constexpr int WIDE_MR = 4;
#endif
// Columns of a panel of B: two vectors; one where B has no more columns than that; three to end an odd number of vectors,
// which leave registers for WIDE_MR rows.
constexpr int PANEL = 2 * LANES, WIDE_PANEL = 3 * LANES;
constexpr int LINE = 16; // words of a cache line

template <bool DOT> inline vf multiply_add(vf sum, vf a, vf b) {
#if defined(ARCH_avx512)
  if constexpr (DOT) return vf(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
#endif
  return sum + a * b;
}

// Minus zero keeps every bit of the word.
inline vf broadcast(const float *word) {
  float x;
  memcpy(&x, word, sizeof x);
  return x - vf{};
}

// One row: its few sums would each wait for the one before, so k is shared out to several of them.
template <bool DOT, bool K_MAJOR, int VECTORS>
void row_kernel(float *sums, const float *a, int64_t stride, const float *b, int words, bool add) {
  constexpr int WAYS = 4;
  vf total[WAYS][VECTORS];
#pragma GCC unroll 4
  for (int i = 0; i < WAYS; i++)
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) total[i][v] = vf{};
  const auto step = [&](int i) {
    const vf left = broadcast(a);
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) total[i][v] = multiply_add<DOT>(total[i][v], left, load(b + v * LANES));
    a += K_MAJOR ? stride : 1;
    b += VECTORS * LANES;
  };
  int w = 0;
  for (; w + WAYS <= words; w += WAYS)
#pragma GCC unroll 4
    for (int i = 0; i < WAYS; i++) step(i);
  for (; w < words; w++) step(0);
  for (int v = 0; v < VECTORS; v++) {
    const vf sum = (total[0][v] + total[1][v]) + (total[2][v] + total[3][v]);
    store(sums + v * LANES, add ? load(sums + v * LANES) + sum : sum);
  }
}

// sums[ROWS][VECTORS * LANES] (+)= A[ROWS][words] B
template <bool DOT, bool K_MAJOR, int VECTORS, int ROWS>
void micro_kernel(float *sums, int64_t sums_stride, const float *a, int64_t stride, const float *b, int words, bool add) {
  if constexpr (ROWS == 1) return row_kernel<DOT, K_MAJOR, VECTORS>(sums, a, stride, b, words, add);
  constexpr int HALF = (ROWS + 1) / 2; // two base pointers, so that few registers reach all rows
  vf total[ROWS][VECTORS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) total[i][v] = vf{};
  const float *low = a, *high = a + HALF * stride;
  for (int w = 0; w < words; w++) {
    vf right[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) {
      right[v] = load(b + v * LANES);
      __builtin_prefetch(b + (16 * VECTORS + v) * LANES);
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const vf left = broadcast(K_MAJOR ? low + i : i < HALF ? low + i * stride : high + (i - HALF) * stride);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; v++) total[i][v] = multiply_add<DOT>(total[i][v], left, right[v]);
    }
    b += VECTORS * LANES;
    // A row a word: its line two lines on, and near the end the rows below, which most likely come next.
    if (!K_MAJOR && w % LINE < ROWS) {
      const bool ends = w + 2 * LINE >= words;
      __builtin_prefetch(a + (w % LINE + (ends ? ROWS : 0)) * stride + w + 2 * LINE - (ends ? words : 0));
    }
    low += K_MAJOR ? stride : 1;
    high++;
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; v++) {
      float *to = sums + i * sums_stride + v * LANES;
      store(to, add ? load(to) + total[i][v] : total[i][v]);
    }
}

typedef void (*MicroKernel)(float *, int64_t, const float *, int64_t, const float *, int, bool);

template <bool DOT, bool K_MAJOR, int VECTORS, int... I> MicroKernel kernel_of_rows(int rows, std::integer_sequence<int, I...>) {
  static constexpr MicroKernel kernels[] = {micro_kernel<DOT, K_MAJOR, VECTORS, I + 1>...};
  return kernels[rows - 1];
}

template <bool DOT, bool K_MAJOR> MicroKernel kernel_of(int vectors, int rows) {
  constexpr std::make_integer_sequence<int, MR> all{};
  constexpr std::make_integer_sequence<int, WIDE_MR> few{};
  if (vectors == 3) return kernel_of_rows<DOT, K_MAJOR, 3>(rows, few);
  return vectors == 1 ? kernel_of_rows<DOT, K_MAJOR, 1>(rows, all) : kernel_of_rows<DOT, K_MAJOR, 2>(rows, all);
}

template <bool DOT> MicroKernel kernel_for(bool k_major, int vectors, int rows) {
  return k_major ? kernel_of<DOT, true>(vectors, rows) : kernel_of<DOT, false>(vectors, rows);
}

} // namespace
} // namespace sdxl::ARCH
