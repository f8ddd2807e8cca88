// Layer norm over rows, a warp to a row, for norm.cu and layer_norm_sm90.cu.
#pragma once
#include "norm.cuh"

extern __shared__ __align__(16) float shared[];

DEVICE int own_row() { return (blockIdx.x * THREADS + threadIdx.x) / 32; }

// body(k, count) for each pack of a lane in a row of c: its place, and how many elements of it lie in the row.
template <int UNROLL, class F> DEVICE void each_pack_of(int c, F &&body) {
#pragma unroll UNROLL
  for (int k = threadIdx.x % 32 * PACK; k < c; k += 32 * PACK) body(k, c - k);
}

// A row of any length, read again where it is used.
DEVICE void normalise(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int c, float eps) {
  const bool aligned = c % PACK == 0;
  float total = 0, spread = 0;
  each_pack_of<1>(c, [&](int k, int count) {
    const Pack in = load(x + k, count, aligned);
    total += (in.at[0] + in.at[1]) + (in.at[2] + in.at[3]);
  });
  const float mu = warp_sum(total) / float(c);
  each_pack_of<1>(c, [&](int k, int count) {
    const Pack in = load(x + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float d = j < count ? in.at[j] - mu : 0.f;
      spread += d * d;
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(spread) / float(c) + eps);
  each_pack_of<1>(c, [&](int k, int count) {
    Pack value = load(x + k, count, aligned);
    const Pack w = load(weight + k, count, aligned), b = load(bias + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) value.at[j] = (value.at[j] - mu) * scale * w.at[j] + b.at[j];
    store(y + k, value, count, aligned);
  });
  if (threadIdx.x % 32 == 0) *mean = mu, *rstd = scale;
}

// The same for rows of whole chunks, as many as a lane can hold its share of (640, 768 and 1280 elements in SDXL): all of a row is on
// its way at once, and beside it the block's weight and bias to shared memory, so that nothing is asked for after the sums.
constexpr int KEPT_COLUMNS = 1280;
DEVICE void normalise_kept(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, bool has_row, int c, float eps) {
  constexpr int N = KEPT_COLUMNS / (32 * CHUNK);
  const int place = threadIdx.x % 32 * CHUNK;
  T *weights = reinterpret_cast<T *>(shared), *biases = weights + c;
  Chunk in[N];
  const auto each = [&](auto &&body) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (has_row && i * 32 * CHUNK + place < c) body(in[i], i * 32 * CHUNK + place);
  };
  each([&](Chunk &own, int k) { own = chunk_at(x + k); });
#pragma unroll 1
  for (int k = threadIdx.x * CHUNK; k < c; k += THREADS * CHUNK) {
    copy_async(shared_address(weights + k), weight + k, true);
    copy_async(shared_address(biases + k), bias + k, true);
  }
  copies_commit();
  float total = 0, spread = 0;
  each([&](const Chunk &own, int) {
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) total += own.at(j) + own.at(j + 1);
  });
  const float mu = warp_sum(total) / float(c);
  each([&](const Chunk &own, int) {
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const float d = own.at(j) - mu;
      spread += d * d;
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(spread) / float(c) + eps);
  copies_wait<0>();
  __syncthreads();
  each([&](const Chunk &own, int k) {
    const Chunk w = chunk_at(weights + k), b = chunk_at(biases + k);
    float value[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) value[j] = (own.at(j) - mu) * scale * w.at(j) + b.at(j);
    put_chunk(y + k, value);
  });
  if (has_row && threadIdx.x % 32 == 0) *mean = mu, *rstd = scale;
}

#define LAYER_NORM T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int rows, int c, float eps
DEVICE void layer_norm(LAYER_NORM) {
  const int row = own_row();
  const int64_t first = int64_t(row) * c;
  if (c % CHUNK == 0 && c <= KEPT_COLUMNS) normalise_kept(y + first, mean + row, rstd + row, x + first, weight, bias, row < rows, c, eps);
  else if (row < rows) normalise(y + first, mean + row, rstd + row, x + first, weight, bias, c, eps);
}

// Four blocks to a multiprocessor.
#define LAYER_NORM_KERNEL(name) extern "C" __global__ void __launch_bounds__(THREADS, 4) JOIN(name, DTYPE)
