// Attention for Hopper: heads 64 wide of [n, l, heads * 64] in the half types, scores never stored. One warp brings tiles by
// TMA; warpgroups of 64 rows each multiply them by wgmma, and the weights stay in registers as the next product's operand
// (FlashAttention 3, Shah 2024). While one warpgroup takes its softmax the other has the tensor cores: they pass a turn by
// named barriers. A block walks an even share of all 64-row pieces; one left over is done by both warpgroups, half the
// keys each, so that no shape wastes a wave.
#include "attention_sm90.cuh"

// A block's share of all pieces of 64 rows: two of one head at a time, or one alone.
struct Walk {
  int unit, end, per_head, head, row;
  bool alone;
  __device__ Walk(int units, int per_head)
      : unit(share_begin(units, blockIdx.x)), end(share_begin(units, blockIdx.x + 1)), per_head(per_head) {}
  __device__ bool next() {
    if (unit >= end) return false;
    head = unit / per_head;
    row = unit % per_head * ROWS;
    alone = unit + 1 == end || unit % per_head + 1 == per_head;
    unit += alone ? 1 : 2;
    return true;
  }
};

// ---- forward over any number of keys: a producer and two consumers

constexpr int KEYS = 128, STAGES = 4;
constexpr int MERGE = 3;                               // the named barrier for that; 1 and 2 are the turns

struct ForwardShared {
  uint64_t query_full[2], query_empty[2], key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];
};

// Both warpgroups have done half the keys of the same rows: the first takes in what the second has.
DEVICE void merge_halves(float *handed, float (&out)[32], Running &softmax, float factor, int group) {
  float *mine = handed + threadIdx.x % WARPGROUP;
  if (group == 1) {
#pragma unroll
    for (int i = 0; i < 32; i++) mine[i * WARPGROUP] = out[i];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      mine[(32 + half) * WARPGROUP] = softmax.most[half];
      mine[(34 + half) * WARPGROUP] = softmax.sum[half];
    }
  }
  named_barrier(MERGE, 2 * WARPGROUP);
  if (group == 0) {
    float kept[2], added[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float other = mine[(32 + half) * WARPGROUP], most = fmaxf(softmax.most[half], other);
      kept[half] = exp2_of((softmax.most[half] - most) * factor);
      added[half] = exp2_of((other - most) * factor);
      softmax.most[half] = most;
      softmax.sum[half] = softmax.sum[half] * kept[half] + mine[(34 + half) * WARPGROUP] * added[half];
    }
#pragma unroll
    for (int i = 0; i < 32; i++) out[i] = out[i] * kept[i / 2 % 2] + mine[i * WARPGROUP] * added[i / 2 % 2];
  }
  named_barrier(MERGE, 2 * WARPGROUP);
}

KERNEL_SM90(attention_hopper_forward)(MAP map_q, MAP map_k, MAP map_v, MAP map_y, float *lse, int heads, int lq, int lk,
                                                   int causal, float scale, int units, int per_head) {
  __shared__ ForwardShared s;
  const uint32_t query_tiles = shared_base(), key_tiles = query_tiles + 2 * TILE, value_tiles = key_tiles + STAGES * TILE,
                 staging = value_tiles + STAGES * TILE;
  launch_dependents();
  if (threadIdx.x == 32) prefetch_map(map_q), prefetch_map(map_k), prefetch_map(map_v);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier_init(at_ring(s.query_full, i), 1);
      mbarrier_init(at_ring(s.query_empty, i), 8);
    }
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(at_ring(s.key_full, i), 1);
      mbarrier_init(at_ring(s.key_empty, i), 8);
      mbarrier_init(at_ring(s.value_full, i), 1);
      mbarrier_init(at_ring(s.value_empty, i), 8);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_prerequisites();
  Walk walk(units, per_head);
  const auto tiles_of = [&]() {
    return (causal ? min(lk, walk.row + (walk.alone ? ROWS : 2 * ROWS)) : lk) + KEYS - 1 >> 7;
  };
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<40>();
    if (threadIdx.x >= 32 || !elect_one()) return;
    for (int work = 0, step = 0; walk.next(); work++) {
      const int column = walk.head % heads * HEAD, image = walk.head / heads, q = work % 2, tiles = tiles_of();
      mbarrier_wait(at_ring(s.query_empty, q), work / 2 % 2 ^ 1);
      mbarrier_arrive_expect(at_ring(s.query_full, q), walk.alone ? HALF_TILE : TILE);
      load_box(query_tiles + q * TILE, map_q, at_ring(s.query_full, q), column, walk.row, image);
      if (!walk.alone) load_box(query_tiles + q * TILE + HALF_TILE, map_q, at_ring(s.query_full, q), column, walk.row + ROWS, image);
#pragma unroll 1
      for (int tile = 0; tile < tiles; tile++, step++) {
        const int stage = step % STAGES, fresh = step / STAGES % 2 ^ 1;
        mbarrier_wait(at_ring(s.key_empty, stage), fresh);
        mbarrier_arrive_expect(at_ring(s.key_full, stage), TILE);
        load_box(key_tiles + stage * TILE, map_k, at_ring(s.key_full, stage), column, tile * KEYS, image);
        mbarrier_wait(at_ring(s.value_empty, stage), fresh);
        mbarrier_arrive_expect(at_ring(s.value_full, stage), TILE);
        load_box(value_tiles + stage * TILE, map_v, at_ring(s.value_full, stage), column, tile * KEYS, image);
      }
    }
    return;
  }
  registers_grow_to<232>();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;
  const Place at;
  const float factor = scale * LOG2E;
  const auto wait_full = [&](uint64_t *full, int step) { mbarrier_wait(at_ring(full, step % STAGES), step / STAGES % 2); };
  // Tiles of keys that are the other warpgroup's.
  const auto pass_over = [&](int step) {
    wait_full(s.key_full, step);
    release(at_ring(s.key_empty, step % STAGES), at);
    wait_full(s.value_full, step);
    release(at_ring(s.value_empty, step % STAGES), at);
  };
  if (group == 1) named_arrive(1, 2 * WARPGROUP);
  for (int work = 0, base = 0; walk.next(); work++) {
    const int tiles = tiles_of(), first = walk.row + (walk.alone ? 0 : group * ROWS), row = first + at.row;
    const bool split = walk.alone && tiles > 1;
    const int stride = split ? 2 : 1;
    const auto mask_tile = [&](float (&scores)[64], int tile) {
      const int key = tile * KEYS;
      if (key + KEYS <= lk && !(causal && key + KEYS > first)) return;
      mask(scores, (causal ? min(lk, row + 1) : lk) - key, (causal ? min(lk, row + 9) : lk) - key, at.lane);
    };
    mbarrier_wait(at_ring(s.query_full, work % 2), work / 2 % 2);
    const uint64_t queries = descriptor_along(query_tiles + work % 2 * TILE + (walk.alone ? 0 : group * HALF_TILE));
    float out[32] = {}, scores[64], shrink[2];
    uint32_t weights[8][4];
    Running softmax;
    int tile = split ? group : 0;
    if (tile == 1) pass_over(base);
    wait_full(s.key_full, base + tile);
    wgmma_fence();
    scores_of(scores, queries, descriptor_along(key_tiles + (base + tile) % STAGES * TILE));
    wgmma_commit();
    wgmma_wait<0>();
    hold(scores);
    release(at_ring(s.key_empty, (base + tile) % STAGES), at);
    mask_tile(scores, tile);
    softmax.take(scores, shrink, factor);
    round_all(weights, scores);
    if (split && tile + 1 < tiles) pass_over(base + tile + 1);
#pragma unroll 1
    for (int next = tile + stride; next < tiles; next += stride) {
      const int stage = (base + next) % STAGES, before = (base + tile) % STAGES;
      wait_full(s.key_full, base + next);
      if (!split) named_barrier(1 + group, 2 * WARPGROUP);
      hold(out);
      wgmma_fence();
      scores_of(scores, queries, descriptor_along(key_tiles + stage * TILE));
      wgmma_commit();
      wait_full(s.value_full, base + tile);
      wgmma_fence();
      add_product(out, weights, descriptor_across<128>(value_tiles + before * TILE, 0));
      wgmma_commit();
      if (!split) named_arrive(2 - group, 2 * WARPGROUP);
      wgmma_wait<1>();
      hold(scores);
      release(at_ring(s.key_empty, stage), at);
      mask_tile(scores, next);
      softmax.take(scores, shrink, factor);
      wgmma_wait<0>();
      hold(out);
      release(at_ring(s.value_empty, before), at);
      scale_rows(out, shrink[0], shrink[1]);
      round_all(weights, scores);
      if (split && next + 1 < tiles) pass_over(base + next + 1);
      tile = next;
    }
    release(at_ring(s.query_empty, work % 2), at);
    wait_full(s.value_full, base + tile);
    hold(out);
    wgmma_fence();
    add_product(out, weights, descriptor_across<128>(value_tiles + (base + tile) % STAGES * TILE, 0));
    wgmma_commit();
    wgmma_wait<0>();
    hold(out);
    release(at_ring(s.value_empty, (base + tile) % STAGES), at);
    if (split) merge_halves(reinterpret_cast<float *>(shared + (staging - shared_address(shared)) + 8 * STAGING), out, softmax, factor, group);
    if (!walk.alone || group == 0)
      finish_rows(map_y, lse, staging + group * 4 * STAGING, out, softmax, heads, walk.head, first, lq, scale, at);
    base += tiles;
  }
  stores_wait_read<0>();
}

// ---- forward over few keys, all of them present: the text's 77. One softmax, and the time goes to reading q and writing y,
// so three warpgroups work on their own, each on every third piece of 64 rows, behind a ring of its own: loads may land out of
// order, and a barrier's parity tells its phases apart only to who waits for each of them.

constexpr int FEW = 80, GROUPS = 3, QUERY_STAGES = 3;
constexpr uint32_t FEW_TILE = FEW * HEAD * 2;

struct FewShared {
  uint64_t query_full[GROUPS * QUERY_STAGES], query_empty[GROUPS * QUERY_STAGES], head_full[2], head_empty[2];
};

extern "C" __global__ void __launch_bounds__(GROUPS *WARPGROUP + 32, 1)
    JOIN(attention_hopper_few_forward, DTYPE)(MAP map_q, MAP map_k, MAP map_v, MAP map_y, float *lse, int heads, int lq, int lk, int causal,
                                              float scale, int units, int per_head) {
  __shared__ FewShared s;
  const uint32_t query_tiles = shared_base(), head_tiles = query_tiles + GROUPS * QUERY_STAGES * HALF_TILE, staging = head_tiles + 4 * FEW_TILE;
  launch_dependents();
  if (threadIdx.x == 32) prefetch_map(map_q), prefetch_map(map_k), prefetch_map(map_v);
  if (threadIdx.x == 0) {
    for (int i = 0; i < GROUPS * QUERY_STAGES; i++) {
      mbarrier_init(at_ring(s.query_full, i), 1);
      mbarrier_init(at_ring(s.query_empty, i), 4);
    }
    for (int i = 0; i < 2; i++) {
      mbarrier_init(at_ring(s.head_full, i), 1);
      mbarrier_init(at_ring(s.head_empty, i), 4 * GROUPS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  wait_for_prerequisites();
  const int begin = share_begin(units, blockIdx.x), end = share_begin(units, blockIdx.x + 1);
  const int first_head = begin / per_head, last_head = (end - 1) / per_head;
  if (threadIdx.x >= GROUPS * WARPGROUP) {
    if (!elect_one()) return;
#pragma unroll 1
    for (int unit = begin, loaded = -1; unit < end; unit++) {
      const int head = unit / per_head, column = head % heads * HEAD, image = head / heads;
      const int turn = (unit - begin) / GROUPS, stage = (unit - begin) % GROUPS * QUERY_STAGES + turn % QUERY_STAGES;
      if (head - first_head != loaded) {
        loaded = head - first_head;
        const int place = loaded % 2;
        const uint32_t full = at_ring(s.head_full, place);
        mbarrier_wait(at_ring(s.head_empty, place), loaded / 2 % 2 ^ 1);
        mbarrier_arrive_expect(full, 2 * FEW_TILE);
        load_box(head_tiles + place * 2 * FEW_TILE, map_k, full, column, 0, image);
        load_box(head_tiles + (place * 2 + 1) * FEW_TILE, map_v, full, column, 0, image);
      }
      mbarrier_wait(at_ring(s.query_empty, stage), turn / QUERY_STAGES % 2 ^ 1);
      mbarrier_arrive_expect(at_ring(s.query_full, stage), HALF_TILE);
      load_box(query_tiles + stage * HALF_TILE, map_q, at_ring(s.query_full, stage), column, unit % per_head * ROWS, image);
    }
    return;
  }
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0);
  const Place at;
  int present = -1;
  // Goes on to a later head; each one in between is given back as well.
  const auto meet = [&](int head) {
#pragma unroll 1
    while (present < head - first_head) {
      if (present >= 0) release(at_ring(s.head_empty, present % 2), at);
      present++;
      mbarrier_wait(at_ring(s.head_full, present % 2), present / 2 % 2);
    }
  };
#pragma unroll 1
  for (int unit = begin + group; unit < end; unit += GROUPS) {
    const int head = unit / per_head, first = unit % per_head * ROWS, row = first + at.row;
    const int turn = (unit - begin) / GROUPS, stage = group * QUERY_STAGES + turn % QUERY_STAGES;
    meet(head);
    const uint32_t keys = head_tiles + present % 2 * 2 * FEW_TILE;
    float scores[FEW / 2], out[32] = {}, shrink[2];
    uint32_t weights[FEW / 16][4];
    Running softmax;
    mbarrier_wait(at_ring(s.query_full, stage), turn / QUERY_STAGES % 2);
    wgmma_fence();
    scores_of(scores, descriptor_along(query_tiles + stage * HALF_TILE), descriptor_along(keys));
    wgmma_commit();
    wgmma_wait<0>();
    hold(scores);
    release(at_ring(s.query_empty, stage), at);
    mask(scores, causal ? min(lk, row + 1) : lk, causal ? min(lk, row + 9) : lk, at.lane);
    softmax.take(scores, shrink, scale * LOG2E);
    round_all(weights, scores);
    hold(out);
    wgmma_fence();
    add_product(out, weights, descriptor_across<128>(keys + FEW_TILE, 0));
    wgmma_commit();
    wgmma_wait<0>();
    hold(out);
    finish_rows(map_y, lse, staging + group * 4 * STAGING, out, softmax, heads, head, first, lq, scale, at);
  }
  meet(last_head);
  stores_wait_read<0>();
}
