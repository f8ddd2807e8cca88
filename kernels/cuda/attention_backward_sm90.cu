// Gradients of attention on Hopper. The weights are computed again from the saved log-sum-exp, twice: blocks of 128 keys walk
// over the queries for dk and dv, blocks of 128 queries over the keys for dq, so that no two add to one gradient and its bits
// repeat. That is seven products where sharing the weights takes five, but then all rounded operands stay in registers and
// nothing is written but the results. Both kinds are one launch, the longer ones first, so that the others fill its last wave.
#include "attention_sm90.cuh"

constexpr int BLOCK = 2 * ROWS, STAGES = 3;
constexpr uint32_t ROW_BYTES = 2 * BLOCK * sizeof(float);
constexpr float NEVER = 1e30f;                         // log-sum-exp of a row that is not there: its weights are zero

// Of 128 rows each, [z, blocks, 2, 128]: the log-sum-exp in powers of two, and delta, the sum of dy y over the head. Eight
// lanes share a row.
KERNEL(attention_hopper_rows)(float *rows, const T *dy, const T *y, const float *lse, int heads, int lq, int blocks, int images) {
  launch_dependents();
  wait_for_prerequisites();
  const int job = (blockIdx.x * THREADS + threadIdx.x) / 8, piece = threadIdx.x % 8;
  const int head = job % heads, row = job / heads % (blocks * BLOCK), image = job / heads / (blocks * BLOCK);
  const bool present = image < images && row < lq;
  float total = 0;
  if (present) {
    const int64_t from = ((int64_t(image) * lq + row) * heads + head) * HEAD + piece * 8;
#pragma unroll
    for (int part = 0; part < 8; part += PACK) {
      const Pack a = load(dy + from + part, PACK), b = load(y + from + part, PACK);
#pragma unroll
      for (int i = 0; i < PACK; i++) total += a.at[i] * b.at[i];
    }
  }
#pragma unroll
  for (int lane = 4; lane > 0; lane /= 2) total += __shfl_xor_sync(0xffffffffu, total, lane);
  if (piece != 0 || image >= images) return;
  const int z = image * heads + head;
  float *to = rows + (int64_t(z) * blocks + row / BLOCK) * 2 * BLOCK + row % BLOCK;
  to[0] = present ? lse[int64_t(z) * lq + row] * LOG2E : NEVER;
  to[BLOCK] = total;
}

struct BackwardShared {
  uint64_t own_full, full[STAGES], empty[STAGES];
};

// What a block works on: 128 keys or queries of one head, and which blocks of the other side they meet.
struct Work {
  int z, first, column, image, begin, end;
  bool keys;
  __device__ Work(int heads, int lq, int lk, int causal, int key_blocks, int query_blocks, int z_count) {
    const int of_keys = z_count * key_blocks, i = int(blockIdx.x) < of_keys ? blockIdx.x : blockIdx.x - of_keys;
    keys = int(blockIdx.x) < of_keys;
    const int blocks = keys ? key_blocks : query_blocks;
    z = i / blocks;
    first = i % blocks * BLOCK;
    column = z % heads * HEAD;
    image = z / heads;
    begin = keys && causal ? min(first / BLOCK, query_blocks) : 0;
    end = keys ? query_blocks : causal ? min(first / BLOCK + 1, key_blocks) : key_blocks;
  }
};

// Where a consumer finds its tiles.
struct Tiles {
  uint32_t own, stages, staging;
  const float *rows;
  __device__ Tiles() : own(shared_base()), stages(own + 2 * TILE), staging(stages + 2 * STAGES * TILE) {
    rows = reinterpret_cast<const float *>(shared + (staging - shared_address(shared)) + 16 * STAGING);
  }
};

// KEYS: own tiles k and v, others q and dy, and the gradients dk and dv. Else own q and dy, others k and v, gradient dq.
template <bool KEYS>
DEVICE void consume(const BackwardShared &s, const Tiles &tiles, const Work &work, const TensorMap &map_first, const TensorMap &map_second,
                    const float *rows, int query_blocks, int lk, int causal, float scale, int group, const Place &at) {
  const float factor = scale * LOG2E;
  const int first = work.first + group * ROWS;
  float sums[32] = {}, value_sums[32] = {}, shift[2], centre[2];
  if (!KEYS) {
    const float *own = rows + (int64_t(work.z) * query_blocks + work.first / BLOCK) * 2 * BLOCK + group * ROWS + at.row;
#pragma unroll
    for (int half = 0; half < 2; half++) shift[half] = own[8 * half], centre[half] = own[BLOCK + 8 * half];
  }
  const uint64_t own_first = descriptor_along(tiles.own + group * HALF_TILE), own_second = descriptor_along(tiles.own + TILE + group * HALF_TILE);
  mbarrier_wait(shared_address(&s.own_full), 0);
#pragma unroll 1
  for (int block = work.begin, i = 0; block < work.end; block++, i++) {
    const int stage = i % STAGES;
    const uint32_t tile = tiles.stages + stage * 2 * TILE;
    const float *shifts = tiles.rows + stage * 2 * BLOCK + at.lane % 4 * 2, *centres = shifts + BLOCK;
    float weights[64], slopes[64];
    mbarrier_wait(at_ring(s.full, stage), i / STAGES % 2);
    wgmma_fence();
    scores_of(weights, own_first, descriptor_along(tile));
    wgmma_commit();
    scores_of(slopes, own_second, descriptor_along(tile + TILE));
    wgmma_commit();
    wgmma_wait<1>();
    hold(weights);
#pragma unroll
    for (int e = 0; e < 64; e += 2) {
      const int half = e / 2 % 2;
      const float2 by_column = KEYS ? *reinterpret_cast<const float2 *>(shifts + e / 4 * 8) : make_float2(0, 0);
      weights[e] = exp2_of(weights[e] * factor - (KEYS ? by_column.x : shift[half]));
      weights[e + 1] = exp2_of(weights[e + 1] * factor - (KEYS ? by_column.y : shift[half]));
    }
    // A query sees keys up to itself, and none past the last.
    if (KEYS ? causal && block * BLOCK < first + ROWS : (block + 1) * BLOCK > lk || (causal && (block + 1) * BLOCK > first)) {
#pragma unroll
      for (int e = 0; e < 64; e++) {
        const int row = first + at.row + e / 2 % 2 * 8, column = block * BLOCK + e / 4 * 8 + at.lane % 4 * 2 + e % 2;
        const int key = KEYS ? row : column, query = KEYS ? column : row;
        if ((!KEYS && key >= lk) || (causal && key > query)) weights[e] = 0;
      }
    }
    wgmma_wait<0>();
    hold(slopes);
#pragma unroll
    for (int e = 0; e < 64; e += 2) {
      const int half = e / 2 % 2;
      const float2 by_column = KEYS ? *reinterpret_cast<const float2 *>(centres + e / 4 * 8) : make_float2(0, 0);
      slopes[e] = weights[e] * (slopes[e] - (KEYS ? by_column.x : centre[half]));
      slopes[e + 1] = weights[e + 1] * (slopes[e + 1] - (KEYS ? by_column.y : centre[half]));
    }
    uint32_t p[8][4], ds[8][4];
    round_all(ds, slopes);
    if (KEYS) round_all(p, weights);
    hold(sums);
    if (KEYS) hold(value_sums);
    wgmma_fence();
    if (KEYS) add_product(value_sums, p, descriptor_across<128>(tile + TILE, 0));
    add_product(sums, ds, descriptor_across<128>(tile, 0));
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
    if (KEYS) hold(value_sums);
    release(at_ring(s.empty, stage), at);
  }
  scale_rows(sums, scale, scale);
  const uint32_t staging = tiles.staging + (group * 4 + at.warp) * STAGING;
  store_rows(map_first, staging, sums, work.column, first + at.warp * 16, work.image, at.lane);
  if (KEYS) store_rows(map_second, staging + 8 * STAGING, value_sums, work.column, first + at.warp * 16, work.image, at.lane);
  stores_wait_read<0>();
}

KERNEL_SM90(attention_hopper_backward)(MAP map_q, MAP map_k, MAP map_v, MAP map_dy, MAP map_dq, MAP map_dk, MAP map_dv, const float *rows,
                                       int z_count, int heads, int lq, int lk, int causal, float scale, int key_blocks, int query_blocks) {
  __shared__ BackwardShared s;
  const Tiles tiles;
  launch_dependents();
  if (threadIdx.x == 32) prefetch_map(map_q), prefetch_map(map_k), prefetch_map(map_v), prefetch_map(map_dy);
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&s.own_full), 1);
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(at_ring(s.full, i), 1);
      mbarrier_init(at_ring(s.empty, i), 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_prerequisites();
  const Work work(heads, lq, lk, causal, key_blocks, query_blocks, z_count);
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<40>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    const TensorMap &own_first = work.keys ? map_k : map_q, &own_second = work.keys ? map_v : map_dy;
    const TensorMap &other_first = work.keys ? map_q : map_k, &other_second = work.keys ? map_dy : map_v;
    const uint32_t own_full = shared_address(&s.own_full);
    mbarrier_arrive_expect(own_full, 2 * TILE);
    load_box(tiles.own, own_first, own_full, work.column, work.first, work.image);
    load_box(tiles.own + TILE, own_second, own_full, work.column, work.first, work.image);
#pragma unroll 1
    for (int block = work.begin, i = 0; block < work.end; block++, i++) {
      const int stage = i % STAGES;
      const uint32_t full = at_ring(s.full, stage), tile = tiles.stages + stage * 2 * TILE;
      mbarrier_wait(at_ring(s.empty, stage), i / STAGES % 2 ^ 1);
      mbarrier_arrive_expect(full, 2 * TILE + (work.keys ? ROW_BYTES : 0));
      load_box(tile, other_first, full, work.column, block * BLOCK, work.image);
      load_box(tile + TILE, other_second, full, work.column, block * BLOCK, work.image);
      if (work.keys)
        load_bytes(shared_address(tiles.rows) + stage * ROW_BYTES, rows + (int64_t(work.z) * query_blocks + block) * 2 * BLOCK, ROW_BYTES, full);
    }
  } else {
    registers_grow_to<232>();
    const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;
    const Place at;
    if (work.keys) consume<true>(s, tiles, work, map_dk, map_dv, rows, query_blocks, lk, causal, scale, group, at);
    else consume<false>(s, tiles, work, map_dq, map_dq, rows, query_blocks, lk, causal, scale, group, at);
  }
}
