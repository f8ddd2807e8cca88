// y = activation(x w^T + bias) + residual for a few rows of x, as the time embedding has: all there is to do is to read w once.
// A warp takes one row of w and ROWS rows of x, AHEAD times 16 bytes of each a lane on their way at once, and what the epilogue
// adds as well. With `sums` the plain sums go there instead.
#include "gemm.cuh"
#include "wide.cuh"

constexpr int ROW_THREADS = 64; // so that 320 rows of w are blocks enough for a large device

template <int ROWS, int AHEAD>
DEVICE void gemv(T *y, float *sums, const T *x, const T *w, const T *bias, const T *residual, int m, int n, int k, int activation) {
  typedef Neighbours<T, WIDE<T>> Run;
  const int lane = threadIdx.x % 32, column = (blockIdx.x * ROW_THREADS + threadIdx.x) / 32, first = blockIdx.y * ROWS, row = first + lane;
  if (column >= n) return;
  const bool own = lane < ROWS && row < m;
  const int64_t place = int64_t(row) * n + column;
  const float added = own && bias != nullptr ? to_float(bias[column]) : 0.f, more = own && residual != nullptr ? to_float(residual[place]) : 0.f;
  w += int64_t(column) * k;
  float total[ROWS] = {};
#pragma unroll 1
  for (int start = lane * WIDE<T>; start < k; start += AHEAD * 32 * WIDE<T>) {
    Run right[AHEAD], left[AHEAD][ROWS];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int at = min(start + i * 32 * WIDE<T>, k - WIDE<T>);
      right[i] = Run(w + at);
#pragma unroll
      for (int r = 0; r < ROWS; r++) left[i][r] = Run(x + int64_t(min(first + r, m - 1)) * k + at);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (start + i * 32 * WIDE<T> >= k) break;
#pragma unroll
      for (int j = 0; j < WIDE<T>; j++) {
        const float factor = right[i].at(j);
#pragma unroll
        for (int r = 0; r < ROWS; r++) total[r] += left[i][r].at(j) * factor;
      }
    }
  }
  float value = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float all = warp_sum(total[r]);
    value = lane == r ? all : value;
  }
  if (!own) return;
  if (sums != nullptr) sums[place] = value;
  else y[place] = from_float<T>(activate(value + added, 0.f, activation) + more);
}

#define GEMV(rows, ahead) \
  KERNEL_OF(ROW_THREADS, gemv_##rows)(T *y, float *sums, const T *x, const T *w, const T *bias, const T *residual, int m, int n, int k, \
                                      int activation) { \
    gemv<rows, ahead>(y, sums, x, w, bias, residual, m, n, k, activation); \
  }

GEMV(2, 6)
GEMV(8, 2)
