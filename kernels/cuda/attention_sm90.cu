// Attention for Hopper: heads 64 wide of [n, l, heads * 64] in the half types, scores never stored. One warp brings tiles by
// TMA; three warpgroups of 64 rows each multiply them by wgmma, and the weights stay in registers as the next product's operand
// (FlashAttention 3, Shah 2024). While one warpgroup takes its softmax the others have the tensor cores. A block walks an even
// share of all 64-row pieces; one left over is done by two warpgroups, half the keys each, so that no shape wastes a wave.
#include "attention_sm90.cuh"

constexpr int GROUPS = 3, KEYS = 128, STAGES = 4;

// A piece of 64 rows, those of one head next to each other: its number in the head, the head's in its image and among all. Found
// by division once and moved on from there, as a thread takes some 150 cycles to divide.
struct Piece {
  int place, head, image, all;
  __device__ Piece(int unit, int per_head, int heads) : all(unit / per_head) {
    place = unit - all * per_head, image = all / heads, head = all - image * heads;
  }
  __device__ void move(int count, int per_head, int heads) {
    for (place += count; place >= per_head; place -= per_head) {
      all++;
      if (++head == heads) head = 0, image++;
    }
  }
  __device__ int row() const { return place * ROWS; }
};

// A block's share of all pieces: as many of one head at a time as there are warpgroups.
struct Walk {
  int left, per_head, heads, pieces = 0;
  Piece at;
  __device__ Walk(int units, int per_head, int heads) : Walk(share_begin(units, blockIdx.x), share_begin(units, blockIdx.x + 1), per_head, heads) {}
  __device__ Walk(int begin, int end, int per_head, int heads) : left(end - begin), per_head(per_head), heads(heads), at(begin, per_head, heads) {}
  __device__ bool next() {
    left -= pieces;
    at.move(pieces, per_head, heads);
    pieces = min(GROUPS, min(left, per_head - at.place));
    return left > 0;
  }
  // Of KEYS keys, as many as a row of these sees.
  __device__ int tiles(int lk, int causal) const { return ((causal ? min(lk, at.row() + pieces * ROWS) : lk) + KEYS - 1) / KEYS; }
};

// ---- forward over any number of keys: a producer and three consumers

constexpr int MERGE = 1;                               // the named barrier of two that share a piece
constexpr uint32_t QUERIES = GROUPS * HALF_TILE;

struct ForwardShared {
  uint64_t query_full[2], query_empty[2], key_full[STAGES], key_empty[STAGES], value_full[STAGES], value_empty[STAGES];
};

// Two warpgroups have done half the keys of the same rows: the first takes in what the second has.
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

// Where tiles lie in shared memory, and what the second of two hands to the first.
struct ForwardTiles {
  uint32_t queries = shared_base(), keys = queries + 2 * QUERIES, values = keys + STAGES * TILE, staging = values + STAGES * TILE,
           handed = staging + 4 * GROUPS * STAGING;
};

// The producer: one thread.
DEVICE void bring(ForwardShared &s, const ForwardTiles &to, Walk walk, const TensorMap &map_q, const TensorMap &map_k, const TensorMap &map_v,
                  int lk, int causal) {
  Ring<STAGES> ring;
  for (int work = 0; walk.next(); work++) {
    const int column = walk.at.head * HEAD, image = walk.at.image, tiles = walk.tiles(lk, causal), q = work % 2;
    mbarrier_wait(at_ring(s.query_empty, q), work / 2 % 2 ^ 1);
    mbarrier_arrive_expect(at_ring(s.query_full, q), walk.pieces * HALF_TILE);
#pragma unroll 1
    for (int i = 0; i < walk.pieces; i++)
      load_box(to.queries + q * QUERIES + i * HALF_TILE, map_q, at_ring(s.query_full, q), column, walk.at.row() + i * ROWS, image);
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++, ring.next()) {
      const int stage = ring.stage;
      mbarrier_wait(at_ring(s.key_empty, stage), ring.parity ^ 1);
      mbarrier_arrive_expect(at_ring(s.key_full, stage), TILE);
      load_box(to.keys + stage * TILE, map_k, at_ring(s.key_full, stage), column, tile * KEYS, image);
      mbarrier_wait(at_ring(s.value_empty, stage), ring.parity ^ 1);
      mbarrier_arrive_expect(at_ring(s.value_full, stage), TILE);
      load_box(to.values + stage * TILE, map_v, at_ring(s.value_full, stage), column, tile * KEYS, image);
    }
  }
}

extern "C" __global__ void __launch_bounds__((1 + GROUPS) * WARPGROUP, 1)
    JOIN(attention_hopper_forward, DTYPE)(MAP map_q, MAP map_k, MAP map_v, MAP map_y, float *lse, int heads, int lq, int lk, int causal,
                                          float scale, int units, int per_head) {
  __shared__ ForwardShared s;
  const ForwardTiles from;
  launch_dependents();
  if (threadIdx.x == 32) prefetch_map(map_q), prefetch_map(map_k), prefetch_map(map_v);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; i++) {
      mbarrier_init(at_ring(s.query_full, i), 1);
      mbarrier_init(at_ring(s.query_empty, i), 4 * GROUPS);
    }
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(at_ring(s.key_full, i), 1);
      mbarrier_init(at_ring(s.key_empty, i), 4 * GROUPS);
      mbarrier_init(at_ring(s.value_full, i), 1);
      mbarrier_init(at_ring(s.value_empty, i), 4 * GROUPS);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  Walk walk(units, per_head, heads);
  wait_for_prerequisites();
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<32>();
    if (threadIdx.x < 32 && elect_one()) bring(s, from, walk, map_q, map_k, map_v, lk, causal);
    return;
  }
  registers_grow_to<160>();
  const int group = __shfl_sync(0xffffffffu, threadIdx.x / WARPGROUP, 0) - 1;
  const Place at;
  const float factor = scale * LOG2E;
  Ring<STAGES> ring; // the next tile of keys and of values
  const auto wait_full = [&](uint64_t *full, const Ring<STAGES> &tile) { mbarrier_wait(at_ring(full, tile.stage), tile.parity); };
  // By a tile that is another warpgroup's. Values are asked for after keys, so that theirs is wait enough.
  const auto pass = [&]() {
    mbarrier_wait_together(at_ring(s.value_full, ring.stage), ring.parity);
    release(at_ring(s.key_empty, ring.stage), at);
    release(at_ring(s.value_empty, ring.stage), at);
    ring.next();
  };
  for (int work = 0; walk.next(); work++) {
    const int tiles = walk.tiles(lk, causal);
    const bool split = walk.pieces == 1 && tiles > 1;
    const int stride = split ? 2 : 1, piece = split ? 0 : group, first = walk.at.row() + piece * ROWS, row = first + at.row;
    mbarrier_wait(at_ring(s.query_full, work % 2), work / 2 % 2);
    if (group >= (split ? 2 : walk.pieces)) {
      release(at_ring(s.query_empty, work % 2), at);
#pragma unroll 1
      for (int tile = 0; tile < tiles; tile++) pass();
      continue;
    }
    const auto mask_tile = [&](float (&scores)[64], int tile) {
      const int key = tile * KEYS;
      if (key + KEYS <= lk && !(causal && key + KEYS > first)) return;
      mask(scores, (causal ? min(lk, row + 1) : lk) - key, (causal ? min(lk, row + 9) : lk) - key, at.lane);
    };
    const uint64_t queries = descriptor_along(from.queries + work % 2 * QUERIES + piece * HALF_TILE);
    float out[32] = {}, scores[64], shrink[2];
    uint32_t weights[8][4];
    Running softmax;
    int tile = split ? group : 0;
    if (tile == 1) pass();
    Ring<STAGES> before; // the tile whose weights are there
    const auto begin_scores = [&]() {
      wait_full(s.key_full, ring);
      hold(out);
      wgmma_fence();
      scores_of(scores, queries, descriptor_along(from.keys + ring.stage * TILE));
      wgmma_commit();
    };
    const auto weigh_scores = [&]() {
      hold(scores);
      release(at_ring(s.key_empty, ring.stage), at);
      mask_tile(scores, tile);
      softmax.take(scores, shrink, factor);
      hold(scores);
      tile += stride;
    };
    const auto round_weights = [&]() {
      round_all(weights, scores);
      before = ring;
      ring.next();
    };
    const auto begin_sums = [&]() {
      wait_full(s.value_full, before);
      hold(out);
      wgmma_fence();
      add_product(out, weights, descriptor_across<128>(from.values + before.stage * TILE, 0));
      wgmma_commit();
    };
    const auto end_sums = [&]() {
      wgmma_wait<0>();
      hold(out);
      release(at_ring(s.value_empty, before.stage), at);
    };
    const auto next_weights = [&]() {
      end_sums();
      scale_rows(out, shrink[0], shrink[1]);
      round_weights();
    };
    begin_scores();
    wgmma_wait<0>();
    weigh_scores();
    round_weights();
#pragma unroll 1
    while (tile < tiles) {
      if (split) pass();
      begin_scores();
      begin_sums();
      wgmma_wait<1>();
      weigh_scores();
      // Without a branch here ptxas moves the wait for the sums to before softmax, which then runs beside nothing.
      if (tile >= tiles) {
        next_weights();
        break;
      }
      next_weights();
    }
    release(at_ring(s.query_empty, work % 2), at);
    begin_sums();
    end_sums();
    if (split && tile - 1 < tiles) pass();
    if (split) merge_halves(reinterpret_cast<float *>(shared + (from.handed - shared_address(shared))), out, softmax, factor, group);
    if (piece == group)
      finish_rows(map_y, lse, from.staging + group * 4 * STAGING, out, softmax, walk.at.head, walk.at.image, walk.at.all, first, lq, scale, at);
  }
  stores_wait_read<0>();
}

// ---- forward over few keys, all of them present: the text's 77. One softmax, and the time goes to reading q and writing y,
// so three warpgroups work on their own, each on every third piece of 64 rows, behind a ring of its own: loads may land out of
// order, and a barrier's parity tells its phases apart only to who waits for each of them.

constexpr int FEW = 80, QUERY_STAGES = 3;
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
  const int begin = share_begin(units, blockIdx.x), end = share_begin(units, blockIdx.x + 1);
  Piece piece(begin, per_head, heads);
  const int first_head = piece.all;
  // Keys and values are most often the prompt's, which no L2 holds since the last step.
  if (threadIdx.x == GROUPS * WARPGROUP && begin < end) {
    prefetch_box(map_k, piece.head * HEAD, 0, piece.image);
    prefetch_box(map_v, piece.head * HEAD, 0, piece.image);
  }
  wait_for_prerequisites();
  if (threadIdx.x >= GROUPS * WARPGROUP) {
    if (!elect_one()) return;
#pragma unroll 1
    for (int unit = begin, loaded = -1; unit < end; unit++, piece.move(1, per_head, heads)) {
      const int column = piece.head * HEAD, image = piece.image;
      const int turn = (unit - begin) / GROUPS, stage = (unit - begin) % GROUPS * QUERY_STAGES + turn % QUERY_STAGES;
      if (piece.all - first_head != loaded) {
        loaded = piece.all - first_head;
        const int place = loaded % 2;
        const uint32_t full = at_ring(s.head_full, place);
        mbarrier_wait(at_ring(s.head_empty, place), loaded / 2 % 2 ^ 1);
        mbarrier_arrive_expect(full, 2 * FEW_TILE);
        load_box(head_tiles + place * 2 * FEW_TILE, map_k, full, column, 0, image);
        load_box(head_tiles + (place * 2 + 1) * FEW_TILE, map_v, full, column, 0, image);
      }
      mbarrier_wait(at_ring(s.query_empty, stage), turn / QUERY_STAGES % 2 ^ 1);
      mbarrier_arrive_expect(at_ring(s.query_full, stage), HALF_TILE);
      load_box(query_tiles + stage * HALF_TILE, map_q, at_ring(s.query_full, stage), column, piece.row(), image);
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
  piece.move(group, per_head, heads);
#pragma unroll 1
  for (int unit = begin + group; unit < end; unit += GROUPS, piece.move(GROUPS, per_head, heads)) {
    const int first = piece.row(), row = first + at.row;
    const int turn = (unit - begin) / GROUPS, stage = group * QUERY_STAGES + turn % QUERY_STAGES;
    meet(piece.all);
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
    finish_rows(map_y, lse, staging + group * 4 * STAGING, out, softmax, piece.head, piece.image, piece.all, first, lq, scale, at);
  }
  meet((end - 1) / per_head);
  stores_wait_read<0>();
}
