// One matrix product under linear, matmul and conv2d: C[m,n] = A[m,k] B[k,n], float32 sums over blocks of k in a fixed order.
// Operands are read only through Rows while they are packed, so a transposed matrix, an im2col view and a flipped kernel
// are all a few lines of Rows; the result leaves through Output, which rounds it to the storage type once.
#pragma once
#include "abi.h"

namespace sdxl::ARCH {

// A logical matrix: `count` elements of row r from column c on, in place or gathered into `scratch`.
template <class T> struct Rows {
  virtual const T *at(int64_t r, int64_t c, int count, T *scratch) const = 0;
};

template <class T> struct Matrix final : Rows<T> {
  const T *data;
  int64_t stride;
  Matrix(const T *data, int64_t stride) : data(data), stride(stride) {}
  const T *at(int64_t r, int64_t c, int, T *) const override { return data + r * stride + c; }
};

// `rows_are_k`: the rows of the view run along k (columns along m or n); otherwise its columns run along k.
template <class T> struct Operand {
  const Rows<T> &rows;
  bool rows_are_k;
};

enum Activation : int { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3, GEGLU = 4 };

// Columns of a GEGLU product come in blocks: GEGLU_BLOCK of h, then the GEGLU_BLOCK gates that belong to them.
constexpr int GEGLU_BLOCK = 32;

// y[row, col] = activation(sum + bias[col] + shift[row / rows_per_shift, col]) + residual[row, col]; absent parts are null.
template <class T> struct Output {
  T *y;
  int64_t columns;
  const T *bias = nullptr;
  const T *shift = nullptr;
  int64_t rows_per_shift = 1;
  const T *residual = nullptr;
  int activation = NONE;
};

template <class T>
void gemm(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int64_t m, int64_t n, int64_t k);

} // namespace sdxl::ARCH
