// Linear layers y = activation(x weight^T + bias) + residual with their gradients, and the batched matrix product.
#include "fp8.h"
#include "gemm.h"
#include "threads.h"

#include <algorithm>
#include <vector>

namespace sdxl::ARCH {
namespace {

// weight[2n, k] in the column order that a GEGLU Output expects; places past the last column repeat it and are not written.
template <class T> struct GegluWeight final : Rows<T> {
  const T *weight;
  int64_t n, k;
  GegluWeight(const T *weight, int64_t n, int64_t k) : weight(weight), n(n), k(k) {}
  void fetch(const T **to, Range rows, Range columns, T *) const override {
    for (int64_t r = rows.begin; r < rows.end; r++) {
      const int64_t column = r / (2 * GEGLU_BLOCK) * GEGLU_BLOCK + r % GEGLU_BLOCK;
      const int64_t inside = column < n ? column : n - 1;
      *to++ = weight + (r / GEGLU_BLOCK % 2 * n + inside) * k + columns.begin;
    }
  }
  int strips(Strip<T> *to, Range rows, Range columns) const override {
    if (!in_words<T>(k) || n % GEGLU_BLOCK != 0) return -1;
    int found = 0;
    for (int64_t r = rows.begin, next; r < rows.end; r = next) {
      next = std::min(rows.end, (r / GEGLU_BLOCK + 1) * GEGLU_BLOCK);
      const T *first;
      fetch(&first, {r, r + 1}, columns, nullptr);
      to[found++] = {first, k, int(r - rows.begin), int(next - r), columns};
    }
    return found;
  }
};

template <class T>
void linear_forward(T *y, const T *x, const T *weight, const T *bias, const T *residual, int m, int n, int k, int activation) {
  Output<T> out{y, n};
  out.bias = bias;
  out.residual = residual;
  out.activation = activation;
  if (activation == GEGLU) {
    const int64_t columns = (int64_t(n) + GEGLU_BLOCK - 1) / GEGLU_BLOCK * (2 * GEGLU_BLOCK);
    gemm<T>(out, {Matrix<T>(x, k), false}, {GegluWeight<T>(weight, n, k), false}, m, columns, k);
  } else gemm<T>(out, {Matrix<T>(x, k), false}, {Matrix<T>(weight, k), false}, m, n, k);
}

// Numbers of e4m3 bytes in storage type.
template <class T> std::vector<T> from_fp8(const uint8_t *bytes, const float *scale, int64_t count) {
  std::vector<T> values(count);
  parallel_for(count, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) values[i] = from_float<T>(from_e4m3(bytes[i]) * scale[0]);
  });
  return values;
}

// CPUs multiply no 8-bit floats: both operands are turned back first.
template <class T>
void linear_fp8_forward(T *y, const uint8_t *x, const float *x_scale, const uint8_t *weight, const float *weight_scale, const T *bias,
                        const T *residual, int m, int n, int k, int activation) {
  const int64_t h = activation == GEGLU ? 2 * int64_t(n) : n;
  const std::vector<T> left = from_fp8<T>(x, x_scale, int64_t(m) * k), right = from_fp8<T>(weight, weight_scale, h * k);
  linear_forward<T>(y, left.data(), right.data(), bias, residual, m, n, k, activation);
}

template <class T> void linear_backward_x(T *dx, const T *dy, const T *weight, int m, int n, int k) {
  gemm<T>({dx, k}, {Matrix<T>(dy, n), false}, {Matrix<T>(weight, k), true}, m, k, n);
}

template <class T> void linear_backward_weight(T *dweight, const T *dy, const T *x, int m, int n, int k) {
  gemm<T>({dweight, k}, {Matrix<T>(dy, n), true}, {Matrix<T>(x, k), true}, n, k, m);
}

template <class T> void matmul_forward(T *c, const T *a, const T *b, int batch, int m, int n, int k, int trans_a, int trans_b) {
  for (int64_t i = 0; i < batch; i++) {
    const Matrix<T> left(a + i * m * k, trans_a ? m : k), right(b + i * k * n, trans_b ? k : n);
    gemm<T>({c + i * m * n, n}, {left, trans_a != 0}, {right, trans_b == 0}, m, n, k);
  }
}

EXPORT_FLOATS(linear_forward, linear_forward)
EXPORT_FLOATS(linear_fp8_forward, linear_fp8_forward)
EXPORT_FLOATS(linear_backward_x, linear_backward_x)
EXPORT_FLOATS(linear_backward_weight, linear_backward_weight)
EXPORT_FLOATS(matmul_forward, matmul_forward)

} // namespace
} // namespace sdxl::ARCH
