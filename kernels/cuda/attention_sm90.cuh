// What the attention kernels for Hopper share: heads 64 wide of [n, l, heads * 64], in tiles of 64 or 128 rows of one head.
// A warpgroup has 64 rows of sums; a warp rounds its 16 and has TMA store them, which leaves out rows past the last.
#pragma once
#include "sm90.cuh"

constexpr float LOG2E = 1.44269504f;
constexpr int HEAD = 64, ROWS = 64;                    // width of a head; rows of a warpgroup
constexpr uint32_t HALF_TILE = ROWS * HEAD * 2, TILE = 2 * HALF_TILE;
constexpr uint32_t STAGING = 16 * HEAD * 2;            // a warp's results on their way to memory

// A named barrier of sm90.cuh without waiting, for those who let others through.
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
// Plain bytes by TMA: 16-byte boundaries.
DEVICE void load_bytes(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes),
               "r"(barrier)
               : "memory");
}
// Keeps the compiler from moving reads and writes of accumulators across this place.
template <int COUNT> DEVICE void hold(float (&d)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define MAP const __grid_constant__ TensorMap

// 2^x to two units in the last place; subnormal results become zero.
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Swizzled tiles begin at multiples of 1024 bytes.
extern __shared__ __align__(1024) uint8_t shared[];
DEVICE uint32_t shared_base() { return (shared_address(shared) + 1023) & ~1023u; }

// Where a thread's sums are: its lane's first row in the warpgroup, and the lane.
struct Place {
  int warp, lane, row;
  __device__ Place() : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), row(warp * 16 + lane / 4) {}
};

// sums = a b^T over the width of a head.
template <int N> DEVICE void scores_of(float (&sums)[N], uint64_t a, uint64_t b) {
#pragma unroll
  for (int k = 0; k < HEAD / 16; k++) wgmma<false, false>(sums, advance(a, 32 * k), advance(b, 32 * k), k > 0);
}
// sums += p b, with b's rows the columns of p.
template <int N> DEVICE void add_product(float (&sums)[32], const uint32_t (&p)[N][4], uint64_t b) {
#pragma unroll
  for (int k = 0; k < N; k++) wgmma<true>(sums, p[k], advance(b, 2048 * k), true);
}
template <int N> DEVICE void round_all(uint32_t (&p)[N][4], const float (&x)[8 * N]) {
#pragma unroll
  for (int i = 0; i < 4 * N; i++) p[i / 4][i % 4] = round_pair(x[2 * i], x[2 * i + 1]);
}

DEVICE void scale_rows(float (&x)[32], float low, float high) {
#pragma unroll
  for (int i = 0; i < 32; i++) x[i] *= i / 2 % 2 ? high : low;
}

// Rounds a warp's 16 x 64 sums into its staging, from where TMA writes the rows that exist.
DEVICE void store_rows(const TensorMap &map, uint32_t staging, const float (&x)[32], int column, int row, int image, int lane) {
  uint32_t rounded[4][4];
  round_all(rounded, x);
  stores_wait_read<0>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 4; j++) store_matrices(staging + swizzled<128>(lane % 16, 2 * j + lane / 16), rounded[j]);
  fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    store_box(map, staging, column, row, image);
    stores_commit();
  }
}

DEVICE uint32_t at_ring(const uint64_t *barriers, int i) { return shared_address(barriers) + 8 * i; }
// What a warp has done with; one lane says so for it.
DEVICE void release(uint32_t barrier, const Place &at) {
  if (at.lane == 0) mbarrier_arrive(barrier);
}
