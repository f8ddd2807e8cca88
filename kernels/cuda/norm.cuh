// What the norms share: 16 bytes of a tensor, an image whose channels may lie in two tensors, and a block that walks rows of channels.
#pragma once
#include "tile.cuh"

// CHUNK neighbours, 16 bytes. They stay as they lie, halves two to a register, until one is read.
struct Chunk {
  uint4 bits;
  __device__ float at(int j) const {
    const int part = j * int(sizeof(T)) / 4;
    const uint32_t word = part == 0 ? bits.x : part == 1 ? bits.y : part == 2 ? bits.z : bits.w;
    if constexpr (sizeof(T) == 4) return __uint_as_float(word);
    T half;
    *reinterpret_cast<uint16_t *>(&half) = uint16_t(j % 2 ? word >> 16 : word);
    return to_float(half);
  }
};
DEVICE Chunk chunk_at(const T *p) { return {*reinterpret_cast<const uint4 *>(p)}; }
DEVICE void put_chunk(T *p, const float (&x)[CHUNK]) {
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; i++)
    if constexpr (sizeof(T) == 4) out[i] = __float_as_uint(x[i]);
    else out[i] = round_pair(x[2 * i], x[2 * i + 1]);
  *reinterpret_cast<uint4 *>(p) = make_uint4(out[0], out[1], out[2], out[3]);
}

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
