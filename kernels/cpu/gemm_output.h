// Where the matrix product ends: float32 sums take their bias, time embedding, activation and residual, and are rounded
// to the storage type once, a vector at a time.
#pragma once
#include "finish.h"
#include "gemm.h"
#include "gemm_pack.h"

#include <algorithm>
#include <type_traits>

namespace sdxl::ARCH {
namespace {

template <class T, int W> inline void activate(vf (&x)[W], int activation) {
  if (activation == SILU) silu<T>(x);
  else if (activation == GELU) gelu<T>(x);
  else if (activation == QUICK_GELU)
    for (vf &each : x) each *= sigmoid(1.702f * each);
}

// A vector of a row from column j on, of which `lanes` are written. The row begins at c.y + at.
template <class T> inline void write_vector(const Output<T> &c, const float *sums, const T *shift, int64_t at, int64_t j, int lanes) {
  vf x[1] = {load(sums)};
  if (c.bias != nullptr) x[0] += load(c.bias + j, lanes);
  if (shift != nullptr) x[0] += load(shift + j, lanes);
  if (c.activation != NONE) activate<T>(x, c.activation);
  if (c.residual != nullptr) x[0] += load(c.residual + at + j, lanes);
  store(c.y + at + j, x[0], lanes);
}

constexpr std::integral_constant<int, LANES> ALL_LANES;

template <class T> void write_row(const Output<T> &c, const float *sums, int64_t row, Range columns) {
  const int64_t at = c.grid.place(row) * c.columns;
  const T *shift = c.shift == nullptr ? nullptr : c.shift + row / c.rows_per_shift * c.columns;
  // One at a time: stores of several vectors in a row were 4 % slower on two threads.
  for (int64_t j = columns.begin; j < columns.end; j += LANES, sums += LANES)
    write_vector(c, sums, shift, at, j, int(std::min<int64_t>(LANES, columns.end - j)));
}

// The same for W vectors of h and gate of a GEGLU, whose columns of C begin at j.
template <class T, int W, class Lanes>
inline void write_geglu_vectors(const Output<T> &c, const float *sums, int64_t at, int64_t j, Lanes lanes) {
  vf h[W], gate[W];
  side_by_side<W>([&](int i) { h[i] = load(sums + i * LANES); });
  side_by_side<W>([&](int i) { gate[i] = load(sums + GEGLU_BLOCK + i * LANES); });
  if (c.bias != nullptr) {
    side_by_side<W>([&](int i) { h[i] += load(c.bias + j + i * LANES, lanes); });
    side_by_side<W>([&](int i) { gate[i] += load(c.bias + c.columns + j + i * LANES, lanes); });
  }
  gelu<T>(gate);
  side_by_side<W>([&](int i) { h[i] *= gate[i]; });
  if (c.residual != nullptr) side_by_side<W>([&](int i) { h[i] += load(c.residual + at + j + i * LANES, lanes); });
  side_by_side<W>([&](int i) { store(c.y + at + j + i * LANES, h[i], lanes); });
}

template <class T> void write_geglu_row(const Output<T> &c, const float *sums, int64_t row, Range columns) {
  constexpr int W = GEGLU_BLOCK / LANES;
  for (int64_t block = columns.begin; block < columns.end; block += 2 * GEGLU_BLOCK, sums += 2 * GEGLU_BLOCK) {
    const int64_t first = block / 2, at = row * c.columns, width = std::min<int64_t>(GEGLU_BLOCK, c.columns - first);
    if (width == GEGLU_BLOCK) write_geglu_vectors<T, W>(c, sums, at, first, ALL_LANES);
    else
      for (int64_t j = 0; j < width; j += LANES)
        write_geglu_vectors<T, 1>(c, sums + j, at, first + j, int(std::min<int64_t>(LANES, width - j)));
  }
}

// sums[rows][columns], rows `stride` apart and readable to a whole vector.
template <class T> void write_tile(const Output<T> &c, const float *sums, int64_t stride, Range rows, Range columns) {
  for (int64_t i = rows.begin; i < rows.end; i++, sums += stride) {
    if (c.activation == GEGLU) write_geglu_row(c, sums, i, columns);
    else write_row(c, sums, i, columns);
  }
}

// The same for sums[columns][rows], in whole vectors of columns.
template <class T> void write_flipped_tile(const Output<T> &c, const float *sums, int64_t stride, Range columns, Range rows) {
  constexpr int MOST = 4 * GEGLU_BLOCK;
  alignas(64) float lines[LANES][MOST];
  for (int64_t i = rows.begin; i < rows.end; i += LANES, sums += LANES) {
    for (int j = 0; j < columns.count(); j += LANES) {
      vf square[LANES];
#pragma GCC unroll 16
      for (int q = 0; q < LANES; q++) square[q] = load(sums + (j + q) * stride);
      transpose(square);
#pragma GCC unroll 16
      for (int q = 0; q < LANES; q++) store(&lines[q][j], square[q]);
    }
    for (int q = 0; q < std::min<int64_t>(LANES, rows.end - i); q++) {
      if (c.activation == GEGLU) write_geglu_row(c, lines[q], i + q, columns);
      else write_row(c, lines[q], i + q, columns);
    }
  }
}

} // namespace
} // namespace sdxl::ARCH
