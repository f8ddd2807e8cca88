// What every optimizer's kernel shares: the walk over all parameters, and reading a weight and writing it back. A parameter is
// a row, the arguments of the CPU's kernel packed as a struct; rows are cut into chunks, and blocks walk over the chunks of all
// rows. A weight lies in T, with a float32 master beside it or none; without one, bfloat16 may be rounded up or down at random,
// with the odds that keep the mean (stochastic rounding), from 16 bits per element of a Philox stream. bfloat16 moments always are.
#pragma once
#include "philox.cuh"

// Elements of a chunk (engine/cuda/plan_optimizer.ts), and of a float32 sum of squares before sums are joined in double.
constexpr int ROW_CHUNK = 8192;

// body(row, chunk of the row, its number) for every chunk; chunks of row r are numbered from first_chunk[r]. The row is a copy,
// or it would be read again after every store.
template <class Row, class F> DEVICE void each_chunk(const Row *rows, const int *first_chunk, int count, F &&body) {
  const int chunks = first_chunk[count];
  for (int chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    int row = 0, beyond = count;
    while (beyond - row > 1) {
      const int middle = (row + beyond) / 2;
      if (first_chunk[middle] <= chunk) row = middle;
      else beyond = middle;
    }
    const Row own = rows[row];
    body(own, chunk - first_chunk[row], chunk);
  }
}

// body(i, count) for every N neighbours of a chunk of n elements.
template <int N = PACK, class F> DEVICE void chunk_packs(int n, int chunk, F &&body) {
  const uint32_t start = uint32_t(chunk) * ROW_CHUNK, end = min(start + ROW_CHUNK, uint32_t(n));
  for (uint32_t i = start + threadIdx.x * N; i < end; i += THREADS * N) body(i, int(end - i));
}

// body(row, i, count) for every N neighbours of every row.
template <int N = PACK, class Row, class F>
DEVICE void each_row_pack(const Row *rows, const int *first_chunk, int count, F &&body) {
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int) {
    chunk_packs<N>(row.n, chunk, [&](uint32_t i, int count) { body(row, i, count); });
  });
}

// Which of an element's numbers random bits are for: each has a Philox block of its own, the last word of its counter.
enum Drawn : uint32_t { WEIGHT, FIRST_MOMENT, SECOND_MOMENT };

struct Rounding {
  int stochastic, seed_low, seed_high, stream;

  // Both round N neighbours to bfloat16 at random; i is a multiple of N.
  template <int N> __device__ void weights(uint32_t i, float (&w)[N]) const {
    move(i, w, philox(block(i, WEIGHT), uint32_t(seed_low), uint32_t(seed_high)));
  }
  template <int N> __device__ void moments(uint32_t i, float (&m)[N], float (&v)[N]) const {
    uint4 first = block(i, FIRST_MOMENT), second = block(i, SECOND_MOMENT);
    philox(first, second, uint32_t(seed_low), uint32_t(seed_high));
    move(i, m, first);
    move(i, v, second);
  }

private:
  // Eight elements to a block of four words, of which a pack or element may be a part.
  __device__ uint4 block(uint32_t i, Drawn drawn) const { return make_uint4(i / 8, 0, uint32_t(stream), drawn); }

  template <int N> static __device__ void move(uint32_t i, float (&x)[N], const uint4 &words) {
#pragma unroll
    for (int j = 0; j < N; j++) {
      const uint32_t at = (i & (8 - N)) | j;
      const uint32_t word = at & 4 ? (at & 2 ? words.w : words.z) : (at & 2 ? words.y : words.x);
      // An infinity stays one, as its own bits end above the cut; a NaN might not.
      const uint32_t moved = __float_as_uint(x[j]) + (at & 1 ? word >> 16 : word & 0xffffu);
      x[j] = __uint_as_float((isnan(x[j]) ? 0x7fffffffu : moved) & 0xffff0000u);
    }
  }
};

struct Weights {
  T *weight;
  float *master;
  Rounding rounding;

  template <int N = PACK> __device__ Floats<N> read(uint32_t i, int count) const {
    return master ? load<N>(master + i, count) : load<N>(weight + i, count);
  }

  template <int N> __device__ void write(uint32_t i, Floats<N> x, int count) const {
    if (master) store(master + i, x, count);
    round(i, x.at);
    store(weight + i, x, count);
  }

  // Rounds N neighbours where that is wanted.
  template <int N> __device__ void round(uint32_t i, float (&x)[N]) const {
#if defined(T_BFLOAT16)
    if (!master && rounding.stochastic) rounding.weights(i, x);
#endif
  }
};

template <class Row> DEVICE Weights weights_of(const Row &row) { return {row.weight, row.master, row.rounding}; }

// One block adds `count` float32 sums in double: its threads take every 256th, and the first adds theirs in order.
// Thread 0 returns the sum, the others 0.
DEVICE double joined(const float *partial, int count) {
  __shared__ double lanes[THREADS];
  double total = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += THREADS) total += double(partial[i]);
  lanes[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x > 0) return 0;
#pragma unroll 1
  for (int i = 1; i < THREADS; i++) total += lanes[i];
  return total;
}
