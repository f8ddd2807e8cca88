// Where the matrix product ends: float32 sums take their bias, time embedding, activation and residual, and are rounded
// to the storage type once, a vector at a time.
#pragma once
#include "gemm.h"

#include <algorithm>

namespace sdxl::ARCH {
namespace {

inline vf activate(vf x, int activation) {
  if (activation == SILU) return x * sigmoid(x);
  if (activation == GELU) return gelu(x);
  if (activation == QUICK_GELU) return x * sigmoid(1.702f * x);
  return x;
}

template <class T> void write_row(const Output<T> &c, const float *sums, int64_t row, Range columns) {
  const int64_t at = c.grid.place(row) * c.columns;
  const T *shift = c.shift == nullptr ? nullptr : c.shift + row / c.rows_per_shift * c.columns;
  for (int64_t j = columns.begin; j < columns.end; j += LANES, sums += LANES) {
    const int64_t count = columns.end - j;
    vf x = load(sums);
    if (c.bias != nullptr) x += load(c.bias + j, count);
    if (shift != nullptr) x += load(shift + j, count);
    x = activate(x, c.activation);
    if (c.residual != nullptr) x += load(c.residual + at + j, count);
    store(c.y + at + j, x, count);
  }
}

template <class T> void write_geglu_row(const Output<T> &c, const float *sums, int64_t row, Range columns) {
  for (int64_t block = columns.begin; block < columns.end; block += 2 * GEGLU_BLOCK, sums += 2 * GEGLU_BLOCK) {
    const int64_t first = block / 2, at = row * c.columns + first, width = std::min<int64_t>(GEGLU_BLOCK, c.columns - first);
    for (int64_t j = 0; j < width; j += LANES) {
      const int64_t count = width - j;
      vf h = load(sums + j), gate = load(sums + GEGLU_BLOCK + j);
      if (c.bias != nullptr) {
        h += load(c.bias + first + j, count);
        gate += load(c.bias + c.columns + first + j, count);
      }
      h *= gelu(gate);
      if (c.residual != nullptr) h += load(c.residual + at + j, count);
      store(c.y + at + j, h, count);
    }
  }
}

// sums[rows][columns], rows `stride` apart and readable to a whole vector.
template <class T> void write_tile(const Output<T> &c, const float *sums, int64_t stride, Range rows, Range columns) {
  for (int64_t i = rows.begin; i < rows.end; i++, sums += stride) {
    if (c.activation == GEGLU) write_geglu_row(c, sums, i, columns);
    else write_row(c, sums, i, columns);
  }
}

} // namespace
} // namespace sdxl::ARCH
