// Weight normalization: the lengths of a weight's rows with a product of two matrices added, and channels scaled by such lengths.
#include "common.cuh"

// y[row] = |weight[row] + scale up[row] down|; weight [rows, inputs], down [rank, inputs], up [rows, rank]. A block takes ROWS rows, so
// that what is read of `down`, mostly from L2, serves as many; a thread has a pack of their inputs in registers and adds to it. Past the
// last row the last one is read again, and its length is not written.
constexpr int ROWS = 8;
KERNEL(row_norms_forward)(float *y, const T *weight, const T *down, const T *up, int rows, int inputs, int rank, float scale) {
  __shared__ float scratch[ROWS][THREADS / 32];
  const bool aligned = inputs % PACK == 0;
  const int first = blockIdx.x * ROWS;
  float squares[ROWS] = {};
#pragma unroll 1
  for (int i = threadIdx.x * PACK; i < inputs; i += THREADS * PACK) {
    Pack value[ROWS], added[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; r++) value[r] = load(weight + int64_t(min(first + r, rows - 1)) * inputs + i, inputs - i, aligned);
#pragma unroll 1
    for (int k = 0; k < rank; k++) {
      const Pack from = load(down + int64_t(k) * inputs + i, inputs - i, aligned);
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const float factor = to_float(up[int64_t(min(first + r, rows - 1)) * rank + k]);
#pragma unroll
        for (int j = 0; j < PACK; j++) added[r].at[j] += factor * from.at[j];
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int j = 0; j < PACK; j++) { // past the end both are 0
        const float sum = value[r].at[j] + scale * added[r].at[j];
        squares[r] += sum * sum;
      }
  }
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    const float sum = warp_sum(squares[r]);
    if (threadIdx.x % 32 == 0) scratch[r][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  const int row = first + int(threadIdx.x);
  if (threadIdx.x >= ROWS || row >= rows) return;
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < THREADS / 32; warp++) total += scratch[threadIdx.x][warp];
  y[row] = sqrtf(total);
}

// What is zero stays zero.
DEVICE float inverse_of(float norm) { return norm == 0.f ? 1.f : 1.f / norm; }

// y = x magnitude / norms + bias, channel by channel; a job is a pack.
KERNEL(weight_norm_forward)(T *y, const T *x, const float *magnitude, const float *norms, const T *bias, int rows, int c) {
  const bool aligned = c % PACK == 0;
  const int packs = (c + PACK - 1) / PACK;
  const uint32_t jobs = uint32_t(rows) * packs;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < jobs; job += gridDim.x * blockDim.x) {
    const int k = int(job % packs) * PACK, count = c - k;
    const int64_t at = int64_t(job / packs) * c + k;
    Pack value = load(x + at, count, aligned);
    const Pack length = load(magnitude + k, count, aligned), norm = load(norms + k, count, aligned);
    const Pack shift = bias ? load(bias + k, count, aligned) : Pack{};
#pragma unroll
    for (int j = 0; j < PACK; j++) value.at[j] = value.at[j] * (length.at[j] * inverse_of(norm.at[j])) + shift.at[j];
    store(y + at, value, count, aligned);
  }
}

// Of the magnitude's gradient, the sum over rows of dy x over the norms: a block sums a chunk of rows for COLUMNS channels, a thread a
// pack of them in every LANES-th row, and leaves partial[chunk, c].
constexpr int COLUMNS = 64, WIDTH = COLUMNS / PACK, LANES = THREADS / WIDTH;
KERNEL(weight_norm_partial)(float *partial, const T *dy, const T *x, int rows, int c, int length) {
  __shared__ __align__(16) float sums[LANES][COLUMNS];
  const bool aligned = c % PACK == 0;
  const int own = int(threadIdx.x) % WIDTH * PACK, lane = threadIdx.x / WIDTH, k = blockIdx.x * COLUMNS + own;
  const int end = min(rows, int(blockIdx.y + 1) * length);
  Pack total = {};
  if (k < c)
#pragma unroll 2
    for (int row = blockIdx.y * length + lane; row < end; row += LANES) {
      const int64_t at = int64_t(row) * c + k;
      const Pack g = load(dy + at, c - k, aligned), value = load(x + at, c - k, aligned);
#pragma unroll
      for (int j = 0; j < PACK; j++) total.at[j] += g.at[j] * value.at[j];
    }
  store(&sums[lane][own], total, PACK, true);
  __syncthreads();
  const int column = blockIdx.x * COLUMNS + threadIdx.x;
  if (threadIdx.x >= COLUMNS || column >= c) return;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < LANES; i++) sum += sums[i][threadIdx.x];
  partial[int64_t(blockIdx.y) * c + column] = sum;
}

KERNEL(weight_norm_finish)(float *dmagnitude, const float *partial, const float *norms, int chunks, int c) {
  const int k = blockIdx.x * THREADS + threadIdx.x;
  if (k >= c) return;
  float total = 0;
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; chunk++) total += partial[int64_t(chunk) * c + k];
  dmagnitude[k] = total * inverse_of(norms[k]);
}
