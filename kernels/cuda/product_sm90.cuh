// The main loop of Hopper's matrix products: C[m, n] = A[m, k] B[k, n] with float32 sums, for linear layers and matmul
// (gemm_sm90.cu, fp8_sm90.cu) and convolutions (conv2d_sm90.cu, conv2d_backward_sm90.cu). A block stays on its
// multiprocessor and takes items (a tile of C, a slab, a part of k) in turn. Its producer warp copies tiles of A and B
// by TMA into a ring of stages, a step of 64 k each; two warpgroups multiply them with wgmma. They share a tile, 64 or
// 128 rows each, or with PINGPONG take tiles in turns, so that one's epilogue hides behind the other's products. A
// warpgroup then begins when the other has seen its last stage arrive: a wait cannot tell a barrier's phase from the
// one two before, so no one may wait that far ahead.
// Two blocks of a cluster may take tiles one below the other and share B's, the wider operand: each brings half of B's
// parts to both, so a stage is free when the consumers of both have done with it. By measurement it is not L2 that this
// relieves but the producer's one thread, where a step has many boxes.
// What the stages read is the Source: prefetch_maps(), begin(work) once an item, load(step, stage, barrier, cluster)
// for each step in turn. B is most often a weight, which no L2 holds since the last pass: prefetch(step, cluster) asks for
// the first of it while the kernel before still runs (NVIDIA's CUTLASS, example 63). To find an item takes divisions, some
// 500 cycles of them: the first one's are done before the wait for that kernel, the others' beside products.
// Float32 is multiplied as sums of two bfloat16 (Henry, Tang & Heinecke 2019): see Pass.
#pragma once
#include "epilogue_sm90.cuh"

constexpr uint16_t BOTH = 3; // blocks of a pair

// Whether an operand lies as two planes of bfloat16, hi = bf16(x) and lo = bf16(x - hi), as gemm_split (gemm.cu) has written
// them: its maps count twice as many slabs or images, the second half of them lo. k is then walked once for each product that
// counts, lo hi, hi lo and hi hi. The small ones come first, as tensor cores cut off what does not fit their sums.
constexpr bool SPLIT = sizeof(T) == 4;
constexpr int PASSES = SPLIT ? 3 : 1;

struct Pass {
  int step, a, b; // within it, and the planes that A and B are read from
};
// Of a step where each pass has `steps`.
DEVICE Pass pass_of(int step, int steps) {
  if constexpr (!SPLIT) return {step, 0, 0};
  const int pass = step / steps;
  return {step - pass * steps, pass == 0, pass == 1};
}

// Where a tile of B begins; along k its second half lies `second` rows after.
struct Place {
  int first, k, slab, second;
};

// ---- operands in shared memory: descriptors of 64 rows of A, of all of B

// A tile of WIDTH m or n. ALONG: [WIDTH][64 k], else chunks of [64 k][span].
template <int WIDTH, bool ALONG> struct OperandTile {
  static constexpr int SPAN = ALONG ? 128 : span_of(WIDTH);
  static constexpr int CHUNK_BYTES = STEP * SPAN, CHUNK = SPAN / 2, CHUNKS = WIDTH / CHUNK; // where not ALONG
  static constexpr int BYTES_64 = 64 * STEP * 2;                                           // of 64 m
  static constexpr int K16 = ALONG ? 32 : 16 * SPAN;
  static __device__ uint64_t describe(uint32_t tile) {
    return ALONG ? descriptor_along(tile) : descriptor_across<SPAN>(tile, CHUNK_BYTES);
  }
  // Brings A's tile from a map [slab][m][k], box [1][WIDTH][64], or [slab][k][m], box [1][64][CHUNK].
  static __device__ void load(uint32_t to, const TensorMap &map, uint32_t barrier, int place, int k, int slab) {
    if constexpr (ALONG) load_box(to, map, barrier, k, place, slab);
    else
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) load_box(to + i * CHUNK_BYTES, map, barrier, place + i * CHUNK, k, slab);
  }
  // B's boxes, with n for m; along k there are two of half the rows. body(bytes from the tile's start, x, y) for each that is this
  // block's to bring: of a pair's every other one.
  template <class F> static __device__ void each_box(const Cluster &cluster, const Place &at, F &&body) {
    const auto own = [&](int i) { return cluster.blocks == 1 || i % 2 == cluster.rank; };
    if constexpr (ALONG) {
      if (own(0)) body(0, at.k, at.first);
      if (own(1)) body(WIDTH / 2 * SPAN, at.k, at.first + at.second);
    } else
#pragma unroll
      for (int i = 0; i < CHUNKS; i++)
        if (own(i)) body(i * CHUNK_BYTES, at.first + i * CHUNK, at.k);
  }
  static __device__ void load(const Cluster &cluster, uint32_t to, const TensorMap &map, uint32_t barrier, const Place &at) {
    each_box(cluster, at, [&](int bytes, int x, int y) {
      if (cluster.blocks == 1) load_box(to + bytes, map, barrier, x, y, at.slab);
      else load_box_to(BOTH, to + bytes, map, barrier, x, y, at.slab);
    });
  }
  static __device__ void prefetch(const Cluster &cluster, const TensorMap &map, const Place &at) {
    each_box(cluster, at, [&](int, int x, int y) { prefetch_box(map, x, y, at.slab); });
  }
};

// ---- items

// How C is cut: tiles down and across, slabs (batches, or taps of a weight's gradient), and k into parts of `part_steps`.
struct Cut {
  int down, across, slabs, items, steps, part_steps;
};

// Neighbours in order share a band of tiles, so that what they read stays in L2: in one of 2048 rows the 132 tiles that
// an H200 has at work are about square, and read the least of A and B. With an even number of tiles down, items 2i and
// 2i + 1 are one below the other: a pair's, of which the last may lie outside C.
template <class S, int COLUMNS> DEVICE Work work_of(int item, const Cut &cut) {
  constexpr int BAND = 2048 / S::M;
  const int tiles = cut.down * cut.across, tile = item % tiles, layer = item / tiles;
  const int band = tile / (BAND * cut.across), inside = tile % (BAND * cut.across), height = min(BAND, cut.down - band * BAND);
  const int part = layer / cut.slabs, first = part * cut.part_steps;
  return {(band * BAND + inside % height) * S::M, inside / height * COLUMNS, layer % cut.slabs, part,
          first, min(cut.steps, first + cut.part_steps)};
}

// ---- the product

extern __shared__ __align__(1024) uint8_t shared[];

// FP8: the operands are bytes, 128 k to a row as 64 halves are, and source.scale() brings the sums back.
template <class S, bool A_ALONG, bool B_ALONG, Kind KIND, bool FP8 = false, class Source>
DEVICE void product(Source source, const Output &out, const Cut &cut) {
  typedef Epilogue<S, KIND> Finish;
  constexpr int STAGES = Finish::STAGES;
  typedef OperandTile<S::M, A_ALONG> A;
  typedef OperandTile<S::N, B_ALONG> B;
  __shared__ __align__(8) uint64_t barriers[2 * STAGES + 2 * GROUPS];
  const uint32_t full = shared_address(barriers), empty = full + 8 * STAGES;
  const uint32_t arrived = empty + 8 * STAGES, turns = arrived + 8 * GROUPS; // of a warpgroup's residual, and its turn
  const uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const Cluster cluster;
  launch_dependents();
  int item = blockIdx.x;
  Work work = work_of<S, Finish::COLUMNS>(item, cut);
  if (threadIdx.x < WARPGROUP) source.begin(work);
  if (threadIdx.x == 32) {
    source.prefetch_maps();
#pragma unroll 1
    for (int step = work.first; step < min(work.end, work.first + STAGES); step++) source.prefetch(step, cluster);
  }
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, 4 * (S::PINGPONG ? 1 : GROUPS) * cluster.blocks); // a lane of each warp that reads
    }
    for (int i = 0; i < GROUPS; i++) {
      if (KIND != PLAIN && !SPLIT) mbarrier_init(arrived + 8 * i, 1);
      if (S::PINGPONG) mbarrier_init(turns + 8 * i, 4);
    }
    fence_mbarrier_init();
  }
  if (cluster.blocks > 1) cluster.sync();
  else __syncthreads();
  wait_for_prerequisites();
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<40>();
    if (threadIdx.x < 32 && elect_one()) {
      Ring<STAGES> ring;
      const auto go_on = [&]() {
        if ((item += gridDim.x) >= cut.items) return false;
        work = work_of<S, Finish::COLUMNS>(item, cut);
        source.begin(work);
        return true;
      };
      do {
#pragma unroll 1
        for (int step = work.first; step < work.end; step++, ring.next()) {
          const uint32_t stage = stages + ring.stage * S::STAGE_BYTES, barrier = full + 8 * ring.stage;
          mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          mbarrier_arrive_expect(barrier, S::STAGE_BYTES);
          source.load(step, stage, stage + S::A_BYTES, barrier, cluster);
        }
      } while (go_on());
    }
  } else {
    registers_grow_to<232>();
    const int group = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    const Finish finish = {out, stages + STAGES * S::STAGE_BYTES + group * Finish::BYTES, arrived + 8 * group, group, thread};
    Ring<STAGES> ring;
    uint32_t done = 0; // items
    float sums[S::BLOCKS][S::N / 2];
    // With pingpong the other's products hide it, and float32 has no registers for it.
    constexpr bool LATE = S::PINGPONG || SPLIT;
    int turn = 0;
    Work next = {};
    const auto go_on = [&]() {
      if ((item += gridDim.x) >= cut.items) return false;
      work = LATE ? work_of<S, Finish::COLUMNS>(item, cut) : next;
      turn ^= 1;
      return true;
    };
    do {
      if (S::PINGPONG && turn != group) {
        ring.skip(work.end - work.first);
        continue;
      }
      if constexpr (S::PINGPONG) finish.prepare(work), __syncwarp();
      typename Finish::Early early = {};
      finish.load_early(early, work);
      if constexpr (S::PINGPONG) mbarrier_wait(turns + 8 * group, (done ^ group ^ 1) & 1); // the first turn is group 0's
      uint32_t last = 0; // the barrier of the stage before, free when its products are done
#pragma unroll 1
      for (int step = work.first; step < work.end; step++, ring.next()) {
        const uint32_t a = stages + ring.stage * S::STAGE_BYTES + S::first_block(group) * A::BYTES_64;
        const uint64_t a_tile = A::describe(a), b_tile = B::describe(stages + ring.stage * S::STAGE_BYTES + S::A_BYTES);
        mbarrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < STEP / 16; q++)
#pragma unroll
          for (int i = 0; i < S::BLOCKS; i++) {
            const uint64_t left = advance(a_tile, q * A::K16 + i * A::BYTES_64), right = advance(b_tile, q * B::K16);
            const bool accumulate = step > work.first || q > 0;
            if constexpr (FP8) wgmma_fp8(sums[i], left, right, accumulate);
            else wgmma<!A_ALONG, !B_ALONG>(sums[i], left, right, accumulate);
          }
        wgmma_commit();
        if (!S::PINGPONG && step == work.first) {
          finish.prepare(work), __syncwarp();
          if (!LATE) next = work_of<S, Finish::COLUMNS>(item + gridDim.x, cut);
        }
        wgmma_wait<1>();
        if (step > work.first && thread % 32 < cluster.blocks) mbarrier_arrive_at(last, thread % 32);
        last = empty + 8 * ring.stage;
      }
      if (S::PINGPONG && thread % 32 == 0) mbarrier_arrive(turns + 8 * (group ^ 1));
      wgmma_wait<0>();
      if (thread % 32 < cluster.blocks) mbarrier_arrive_at(last, thread % 32);
      __syncwarp();
      if constexpr (FP8) {
        const float scale = source.scale();
#pragma unroll
        for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
          for (int e = 0; e < S::N / 2; e++) sums[i][e] *= scale;
      }
      finish.write(sums, early, work, done++);
    } while (go_on());
    if (!SPLIT && thread == 0) stores_wait_read<0>();
  }
  if (cluster.blocks > 1) cluster.sync(); // the other's last arrivals come here
}

// ---- entries

typedef Tile<128, 256, false> Tile256;
typedef Tile<128, 160, false> Tile160;
typedef Tile<128, 160, true> Tile160Pingpong;
typedef Tile<256, 160, false> Tile160Tall;
typedef Tile<128, 128, true> Tile128Pingpong;
typedef Tile<128, 80, false> Tile80;

// What every entry takes before its own parameters (engine/cuda/plan_sm90.ts), and what product() makes of it.
#define PRODUCT \
  const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, ROWS y, ROWS residual, float *partial, const T *bias, int rows, \
      int columns, int has_residual, int partial_row, int partial_slab, int partial_part, int down, int across, int slabs, int items, \
      int steps, int part_steps
#define PRODUCT_OUTPUT(shift, rows_per_shift, activation) \
  {y, residual, partial, bias, shift, rows, columns, rows_per_shift, activation, has_residual, partial_row, partial_slab, partial_part}
#define PRODUCT_CUT Cut{down, across, slabs, items, steps, part_steps}
