// y = activation(x w^T + bias) + residual for a few rows of x, as the time embedding has: all there is to do is to read w once.
// A block takes one row of w and ROWS rows of x; a thread has AHEAD times 16 bytes of each on their way at once, and what the
// epilogue adds as well. Few threads to many blocks, so that 320 rows of w fill a large device. With `sums` the plain sums go
// there instead.
#include "gemm.cuh"
#include "wide.cuh"

constexpr int COUNT = 128, ROWS = 4, AHEAD = 2;

KERNEL_OF(COUNT, gemv)(T *y, float *sums, const T *x, const T *w, const T *bias, const T *residual, int m, int n, int k, int activation) {
  typedef Neighbours<T, WIDE<T>> Run;
  __shared__ float parts[COUNT / 32][ROWS];
  const int column = blockIdx.x, first = blockIdx.y * ROWS, lane = threadIdx.x % 32, row = first + threadIdx.x;
  const bool own = threadIdx.x < ROWS && row < m;
  const int64_t place = int64_t(row) * n + column;
  const float added = own && bias != nullptr ? to_float(bias[column]) : 0.f, more = own && residual != nullptr ? to_float(residual[place]) : 0.f;
  w += int64_t(column) * k;
  float total[ROWS] = {};
#pragma unroll 1
  for (int start = threadIdx.x * WIDE<T>; start < k; start += AHEAD * COUNT * WIDE<T>) {
    Run right[AHEAD], left[AHEAD][ROWS];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      const int at = min(start + i * COUNT * WIDE<T>, k - WIDE<T>);
      right[i] = Run(w + at);
#pragma unroll
      for (int r = 0; r < ROWS; r++) left[i][r] = Run(x + int64_t(min(first + r, m - 1)) * k + at);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      if (start + i * COUNT * WIDE<T> >= k) break;
#pragma unroll
      for (int j = 0; j < WIDE<T>; j++) {
        const float factor = right[i].at(j);
#pragma unroll
        for (int r = 0; r < ROWS; r++) total[r] += left[i][r].at(j) * factor;
      }
    }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    total[r] = warp_sum(total[r]);
    if (lane == r) parts[threadIdx.x / 32][r] = total[r];
  }
  __syncthreads();
  if (!own) return;
  float value = 0;
#pragma unroll
  for (int part = 0; part < COUNT / 32; part++) value += parts[part][threadIdx.x];
  if (sums != nullptr) sums[place] = value;
  else y[place] = from_float<T>(activate(value + added, 0.f, activation) + more);
}
