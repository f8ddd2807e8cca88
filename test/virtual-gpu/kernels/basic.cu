// Small kernels for the tests of the virtual GPU: a vector sum, a tiled matrix product, a softmax over rows, sums over a
// whole grid by atomics and by a last-block flag, and what tests of divergence, local memory and jump tables need.
// Those named bad_* have the fault that their name tells.
#include <cuda_fp16.h>

extern "C" __global__ void vadd(const float *a, const float *b, float *c, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) c[i] = a[i] + b[i];
}

// c[m, n] = a[m, k] b[k, n] by 16 x 16 tiles in shared memory.
extern "C" __global__ void __launch_bounds__(256)
    sgemm(const float *a, const float *b, float *c, int m, int n, int k) {
  __shared__ float as[16][17], bs[16][16];
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int row = blockIdx.y * 16 + ty, column = blockIdx.x * 16 + tx;
  float sum = 0;
  for (int k0 = 0; k0 < k; k0 += 16) {
    as[ty][tx] = row < m && k0 + tx < k ? a[row * k + k0 + tx] : 0;
    bs[ty][tx] = k0 + ty < k && column < n ? b[(k0 + ty) * n + column] : 0;
    __syncthreads();
#pragma unroll 4
    for (int q = 0; q < 16; q++) sum = fmaf(as[ty][q], bs[q][tx], sum);
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

// A float4 read of an array that is declared to hold floats: aligned only by luck.
extern "C" __global__ void bad_float4(float *x) {
  __shared__ float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float4 v = *reinterpret_cast<const float4 *>(&s[(threadIdx.x * 4) % 256]);
  x[threadIdx.x] = v.x + v.y + v.z + v.w;
}

static __device__ float block_sum(float x, float *shared) {
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  for (int w = 0; w < blockDim.x / 32; w++) x += shared[w];
  __syncthreads();
  return x;
}

extern "C" __global__ void softmax(const float *x, float *y, int n) {
  __shared__ float shared[32];
  const float *row = x + blockIdx.x * n;
  float sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += expf(row[i]);
  sum = block_sum(sum, shared);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[blockIdx.x * n + i] = expf(row[i]) / sum;
}

// The barrier that half a warp does not reach.
extern "C" __global__ void bad_barrier(float *x) {
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 40) __syncthreads();
  x[threadIdx.x] = s[63 - threadIdx.x];
}

// The warp's lanes hand values to each other through shared memory; without __syncwarp that is a race.
extern "C" __global__ void warp_exchange(const float *x, float *y) {
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  __syncwarp();
  y[threadIdx.x] = s[31 - threadIdx.x];
}

extern "C" __global__ void bad_warp_exchange(const float *x, float *y) {
  __shared__ volatile float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = const_cast<float *>(s)[31 - threadIdx.x];
}

// Neighbouring half words by different threads, read and written in place: no race.
extern "C" __global__ void half_in_place(__half *x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = __float2half(__half2float(x[i]) * 2);
}

// Each element from its neighbour, in place: a race between threads of a warp, of a block and of two blocks.
extern "C" __global__ void bad_shift_in_place(float *x, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i] = x[(i + 1) % n] + 1;
}

extern "C" __global__ void bad_same_word(float *y) { y[0] = blockIdx.x; }

extern "C" __global__ void count_atomic(const int *x, unsigned *counts, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) atomicAdd(&counts[x[i]], 1u);
}

// Partial sums by block; the block that finishes last adds them up. Correct only with both fences.
template <bool release, bool acquire>
static __device__ void last_block(const float *x, volatile float *partial, unsigned *done, float *y, int n) {
  __shared__ float shared[32];
  __shared__ bool last;
  float sum = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) sum += x[i];
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) {
    const_cast<float *>(partial)[blockIdx.x] = sum;
    if (release) __threadfence();
    last = atomicAdd(done, 1u) == gridDim.x - 1;
    if (acquire) __threadfence();
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    sum = 0;
    for (int b = 0; b < gridDim.x; b++) sum += const_cast<float *>(partial)[b];
    *y = sum;
  }
}
extern "C" __global__ void grid_sum(const float *x, float *partial, unsigned *done, float *y, int n) {
  last_block<true, true>(x, partial, done, y, n);
}
extern "C" __global__ void bad_grid_sum_release(const float *x, float *partial, unsigned *done, float *y, int n) {
  last_block<false, true>(x, partial, done, y, n);
}
extern "C" __global__ void bad_grid_sum_acquire(const float *x, float *partial, unsigned *done, float *y, int n) {
  last_block<true, false>(x, partial, done, y, n);
}

// Local memory indexed at run time, and lanes that part in a jump table, a loop and a break.
extern "C" __global__ void diverge(const int *x, int *y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int table[8];
  for (int k = 0; k < 8; k++) table[k] = x[(i + k) % n] * k;
  int v = x[i], sum = 0;
  for (int k = 0; k < v; k++) {
    if (k == 40) break;
    sum += table[(k + v) & 7] + __popc(__activemask()) * 0;
  }
  switch (v % 7) {
    case 0: sum += __clz(v); break;
    case 1: sum ^= v << 3; break;
    case 2: sum -= __brev(v); break;
    case 3: sum *= 17; break;
    case 4: sum = __mulhi(sum, 1 << 20); break;
    case 5: sum /= v; break;
    default: sum %= 13;
  }
  y[i] = sum;
}

// A barrier that only some warps of the block wait for, by number.
extern "C" __global__ void named_barrier(const float *x, float *y) {
  __shared__ float s[64];
  if (threadIdx.x < 64) {
    s[threadIdx.x] = x[threadIdx.x];
    asm volatile("bar.sync 1, 64;" ::: "memory");
    y[threadIdx.x] = s[63 - threadIdx.x];
  }
}

extern "C" __global__ void bad_endless(int *x) {
  while (atomicAdd(x, 0) == 0) {}
}
