// What the norms share: an image whose channels may lie in two tensors, and a block that walks rows of channels.
#pragma once
#include "common.cuh"

// [pixels, c], whose first `own` channels are x's and whose others are skip's.
struct Image {
  const T *x, *skip;
  int own, c;
  // Channel k of a pixel; those of the pixels that follow lie stride(k) apart.
  __device__ const T *at(int64_t pixel, int k) const { return k < own ? x + pixel * own + k : skip + pixel * (c - own) + k - own; }
  __device__ int stride(int k) const { return k < own ? own : c - own; }
};

// A block over rows of c channels: a thread keeps a pack of channels and walks every `lanes`-th row. Where a row has more
// packs than the block threads, a thread has several packs, one after another.
struct Columns {
  int c, packs, width, lanes, lane, column;
  bool aligned;
  __device__ explicit Columns(int c)
      : c(c), packs((c + PACK - 1) / PACK), width(min(packs, THREADS)), lanes(THREADS / width), lane(threadIdx.x / width),
        column(threadIdx.x % width), aligned(c % PACK == 0) {}
};

// to[k] = the sum over lanes, in order, of values[lane][k]; `values` holds [lanes][c].
DEVICE float lane_sum(const float *values, const Columns &columns, int k) {
  float total = 0;
#pragma unroll 1
  for (int lane = 0; lane < columns.lanes; lane++) total += values[lane * columns.c + k];
  return total;
}
