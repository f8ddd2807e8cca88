// What the attention kernels for Hopper share: heads 64 wide of [n, l, heads * 64], in tiles of 64 or 128 rows of one head.
// A warpgroup has 64 rows of sums; a warp rounds its 16 and has TMA store them, which leaves out rows past the last.
#pragma once
#include "sm90.cuh"

constexpr float LOG2E = 1.44269504f;
constexpr int HEAD = 64, ROWS = 64;                    // width of a head; rows of a warpgroup
constexpr uint32_t HALF_TILE = ROWS * HEAD * 2, TILE = 2 * HALF_TILE;
constexpr uint32_t STAGING = 16 * HEAD * 2;            // a warp's results on their way to memory

// For a warp of which one lane then says that it has done with the stage: no other may still be waiting, as the next phase but one
// would lock it out.
DEVICE void mbarrier_wait_together(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "vote.sync.all.pred done, done, 0xffffffff;\n@!done bra WAIT;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
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

// ---- forward

constexpr float MASKED = -1e30f;                       // a score that is not seen

// The first of this block's even share of `units`; the next block's is this one's end.
DEVICE int share_begin(int units, int block) {
  const int each = units / gridDim.x, more = units % gridDim.x;
  return block * each + min(block, more);
}

// The columns that a row does not see. `seen` counts those that it does.
template <int N> DEVICE void mask(float (&scores)[N], int seen_low, int seen_high, int lane) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    const int column = i / 4 * 8 + i % 2 + lane % 4 * 2;
    if (column >= (i / 2 % 2 ? seen_high : seen_low)) scores[i] = MASKED;
  }
}

// A row's largest score and its sum of weights relative to that, this lane's share of it; for two rows.
struct Running {
  float most[2] = {MASKED, MASKED}, sum[2] = {0, 0};

  // Scores become weights relative to the largest until now, in units of `factor` powers of two. What was summed before
  // has to shrink.
  template <int N> __device__ void take(float (&scores)[N], float (&shrink)[2], float factor) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float next = most[half];
#pragma unroll
      for (int i = 2 * half; i < N; i += 4) next = fmaxf(next, fmaxf(scores[i], scores[i + 1]));
      next = row_max(next);
      shrink[half] = exp2_of((most[half] - next) * factor);
      const float offset = next * factor;
      float total[2] = {0, 0}; // one chain of additions would take longer than the exponentials
#pragma unroll
      for (int i = 2 * half; i < N; i += 4)
#pragma unroll
        for (int e = i; e < i + 2; e++) {
          scores[e] = exp2_of(scores[e] * factor - offset);
          total[e % 2] += scores[e];
        }
      most[half] = next;
      sum[half] = sum[half] * shrink[half] + (total[0] + total[1]);
    }
  }
};

// The results of a warpgroup's rows from `first` on: sums over their totals, and the log-sum-exp. The head is one of its image, and
// number `all` of all.
DEVICE void finish_rows(const TensorMap &map_y, float *lse, uint32_t staging, float (&out)[32], const Running &softmax, int head,
                        int image, int all, int first, int lq, float scale, const Place &at) {
  const float low = row_sum(softmax.sum[0]), high = row_sum(softmax.sum[1]);
  scale_rows(out, 1.f / low, 1.f / high);
  // The results before these have left the staging.
  stores_wait_read<0>();
  __syncwarp();
  store_rows(map_y, staging + at.warp * STAGING, out, head * HEAD, first + at.warp * 16, image, at.lane);
  const int row = first + at.row;
  if (at.lane % 4 == 0) {
    if (row < lq) lse[int64_t(all) * lq + row] = softmax.most[0] * scale + __logf(low);
    if (row + 8 < lq) lse[int64_t(all) * lq + row + 8] = softmax.most[1] * scale + __logf(high);
  }
}
