// Attention over [n, l, heads * d], forward and backward. For heads of up to 64 in the half types the scores are never
// stored: a tile of rows meets the other side in blocks of 64 while a running maximum and sum are kept (FlashAttention 2,
// Dao 2023). Backward runs twice, over query tiles for dq and over key tiles for dk and dv, so that no two blocks add to
// one gradient and its bits repeat. Other heads (the VAE's 512) and float32 go by products of bounded pieces with the
// softmax kernels at the end of this file between them (engine/cuda/plan_attention.ts).
#include "tile.cuh"

constexpr float MASKED = -1e30f;

#if !defined(T_FLOAT32)

constexpr float LOG2E = 1.44269504f;

constexpr int WARPS = 4, COUNT = WARPS * 32;
constexpr int BLOCK = 64;                              // rows of the other side per step
constexpr int HEAD = 64, CHUNKS = HEAD / CHUNK;        // narrower heads are padded with zeros
constexpr int ROW_BYTES = HEAD * int(sizeof(T));

// One side of the attention, of one head: rows `stride` apart.
struct Side {
  const T *data;
  int length, d, stride;
  __device__ Side(const T *all, int length, int heads, int d)
      : data(all + int64_t(blockIdx.y / heads) * length * heads * d + blockIdx.y % heads * d), length(length), d(d), stride(heads * d) {}

  // ROWS rows from `first` into a tile; zeros past the last one and past d.
  template <int ROWS> __device__ void copy(uint32_t tile, int first) const {
    const int chunk = threadIdx.x % CHUNKS;
#pragma unroll 1
    for (int row = threadIdx.x / CHUNKS; row < ROWS; row += COUNT / CHUNKS) {
      const bool present = first + row < length && chunk * CHUNK < d;
      copy_async(tile + tile_offset<CHUNKS>(row, chunk), present ? data + int64_t(first + row) * stride + chunk * CHUNK : data, present);
    }
  }
};

// 16 x 64 sums of a warp: eight fragments of 16 x 8.
struct Strip {
  float at[8][4] = {};

  // Rows from `first` of one head, times `factor`; this lane has rows lane / 4 and that + 8.
  __device__ void write(T *all, const Side &side, int heads, int first, float factor_low, float factor_high, int lane) const {
    T *to = all + int64_t(blockIdx.y / heads) * side.length * side.stride + blockIdx.y % heads * side.d;
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first + lane / 4 + 8 * half;
      const float factor = half ? factor_high : factor_low;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        const int column = 8 * j + lane % 4 * 2;
        if (row < side.length && column < side.d)
          *reinterpret_cast<uint32_t *>(to + int64_t(row) * side.stride + column) =
              round_pair(at[j][2 * half] * factor, at[j][2 * half + 1] * factor);
      }
    }
  }
};

// sums[i] += a b^T with 16 of a's rows from m + 16 i, and b the 64 rows of another tile, both [row][d].
template <int STRIPS> DEVICE void add_scores(Strip (&sums)[STRIPS], uint32_t a_tile, int m, uint32_t b_tile, int lane) {
#pragma unroll
  for (int k = 0; k < HEAD; k += 16) {
    uint32_t a[STRIPS][4], b[4];
#pragma unroll
    for (int i = 0; i < STRIPS; i++) load_a<CHUNKS>(a[i], a_tile, m + 16 * i, k, lane);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      load_b<CHUNKS>(b, b_tile, 16 * j, k, lane);
#pragma unroll
      for (int i = 0; i < STRIPS; i++) {
        multiply(sums[i].at[2 * j], a[i], b[0], b[1]);
        multiply(sums[i].at[2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

// sums[i] += p[i] b with p rounded to storage, and b the 64 rows of a tile [row][d].
template <int STRIPS> DEVICE void add_product(Strip (&sums)[STRIPS], const Strip (&p)[STRIPS], uint32_t b_tile, int lane) {
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t a[STRIPS][4], b[4];
#pragma unroll
    for (int i = 0; i < STRIPS; i++)
#pragma unroll
      for (int e = 0; e < 4; e++) a[i][e] = round_pair(p[i].at[2 * k + e / 2][e % 2 * 2], p[i].at[2 * k + e / 2][e % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      load_b_turned<CHUNKS>(b, b_tile, 16 * j, 16 * k, lane);
#pragma unroll
      for (int i = 0; i < STRIPS; i++) {
        multiply(sums[i].at[2 * j], a[i], b[0], b[1]);
        multiply(sums[i].at[2 * j + 1], a[i], b[2], b[3]);
      }
    }
  }
}

extern __shared__ __align__(128) uint8_t shared[];

// ---- forward: a block has 128 queries, a warp two strips of 16

constexpr int STRIPS = 2, QUERIES = WARPS * STRIPS * 16;

// Scores of a strip and a block of keys become probabilities relative to the running maximum, in units of `factor` powers
// of two; what was summed before shrinks with it.
DEVICE void softmax_step(Strip &scores, Strip &out, float (&most)[2], float (&sum)[2], float factor, int row, int key, int lk, int causal,
                         int lane) {
  const bool edge = key + BLOCK > lk || (causal && key + BLOCK - 1 > row);
#pragma unroll
  for (int half = 0; half < 2; half++) {
    if (edge) {
      const int seen = (causal ? min(lk, row + lane / 4 + 8 * half + 1) : lk) - key - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; j++) {
        if (8 * j >= seen) scores.at[j][2 * half] = MASKED;
        if (8 * j + 1 >= seen) scores.at[j][2 * half + 1] = MASKED;
      }
    }
    float next = most[half];
#pragma unroll
    for (int j = 0; j < 8; j++) next = fmaxf(next, fmaxf(scores.at[j][2 * half], scores.at[j][2 * half + 1]));
    next = row_max(next);
    const float shrink = exp2_of((most[half] - next) * factor), offset = next * factor;
    float total = 0;
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 2 * half; e < 2 * half + 2; e++) {
        scores.at[j][e] = exp2_of(scores.at[j][e] * factor - offset);
        total += scores.at[j][e];
        out.at[j][e] *= shrink;
      }
    most[half] = next;
    sum[half] = sum[half] * shrink + total; // this lane's share; the lanes of a row join at the end
  }
}

KERNEL_OF(COUNT, attention_flash_forward)(T *y, float *lse, const T *q, const T *k, const T *v, int heads, int lq, int lk, int d, int causal,
                                          float scale) {
  const Side queries(q, lq, heads, d), keys(k, lk, heads, d), values(v, lk, heads, d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * QUERIES, own = warp * STRIPS * 16;
  const uint32_t query_tile = shared_address(shared), stages = query_tile + QUERIES * ROW_BYTES;
  const int end = causal ? min(lk, first + QUERIES) : lk;
  const auto copy_stage = [&](int stage, int key) {
    if (key < end) {
      keys.copy<BLOCK>(stages + stage * 2 * BLOCK * ROW_BYTES, key);
      values.copy<BLOCK>(stages + (stage * 2 + 1) * BLOCK * ROW_BYTES, key);
    }
    copies_commit();
  };
  queries.copy<QUERIES>(query_tile, first);
  copy_stage(0, 0);
  Strip out[STRIPS];
  float most[STRIPS][2], sum[STRIPS][2];
#pragma unroll
  for (int i = 0; i < STRIPS; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      most[i][half] = MASKED;
      sum[i][half] = 0;
    }
  int stage = 0;
#pragma unroll 1
  for (int key = 0; key < end; key += BLOCK, stage ^= 1) {
    copy_stage(stage ^ 1, key + BLOCK);
    copies_wait<1>();
    __syncthreads();
    const uint32_t key_tile = stages + stage * 2 * BLOCK * ROW_BYTES, value_tile = key_tile + BLOCK * ROW_BYTES;
    Strip scores[STRIPS];
    add_scores(scores, query_tile, own, key_tile, lane);
#pragma unroll
    for (int i = 0; i < STRIPS; i++)
      softmax_step(scores[i], out[i], most[i], sum[i], scale * LOG2E, first + own + 16 * i, key, lk, causal, lane);
    add_product(out, scores, value_tile, lane);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < STRIPS; i++) {
    const float low = row_sum(sum[i][0]), high = row_sum(sum[i][1]);
    out[i].write(y, queries, heads, first + own + 16 * i, 1.f / low, 1.f / high, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int row = first + own + 16 * i + lane / 4 + 8 * half;
      if (lane % 4 == 0 && row < lq) lse[int64_t(blockIdx.y) * lq + row] = most[i][half] * scale + logf(half ? high : low);
    }
  }
}

// ---- backward: a block has 64 rows of its side, a warp a strip of 16

constexpr int OWN = WARPS * 16;

// dq = the sum over keys of dS k, with dS = scale P (dy v - delta).
KERNEL_OF(COUNT, attention_flash_backward_q)(T *dq, const T *dy, const float *lse, const float *delta, const T *q, const T *k, const T *v,
                                             int heads, int lq, int lk, int d, int causal, float scale) {
  const Side queries(q, lq, heads, d), grads(dy, lq, heads, d), keys(k, lk, heads, d), values(v, lk, heads, d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * OWN, row = first + warp * 16 + lane / 4;
  const uint32_t query_tile = shared_address(shared), grad_tile = query_tile + OWN * ROW_BYTES, stages = grad_tile + OWN * ROW_BYTES;
  const int end = causal ? min(lk, first + OWN) : lk;
  const auto copy_stage = [&](int stage, int key) {
    if (key < end) {
      keys.copy<BLOCK>(stages + stage * 2 * BLOCK * ROW_BYTES, key);
      values.copy<BLOCK>(stages + (stage * 2 + 1) * BLOCK * ROW_BYTES, key);
    }
    copies_commit();
  };
  queries.copy<OWN>(query_tile, first);
  grads.copy<OWN>(grad_tile, first);
  copy_stage(0, 0);
  float shift[2], centre[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int64_t at = int64_t(blockIdx.y) * lq + row + 8 * half;
    shift[half] = row + 8 * half < lq ? lse[at] * LOG2E : 0.f;
    centre[half] = row + 8 * half < lq ? delta[at] : 0.f;
  }
  Strip out[1];
  int stage = 0;
#pragma unroll 1
  for (int key = 0; key < end; key += BLOCK, stage ^= 1) {
    copy_stage(stage ^ 1, key + BLOCK);
    copies_wait<1>();
    __syncthreads();
    const uint32_t key_tile = stages + stage * 2 * BLOCK * ROW_BYTES, value_tile = key_tile + BLOCK * ROW_BYTES;
    Strip scores[1], ds[1];
    add_scores(scores, query_tile, warp * 16, key_tile, lane);
    add_scores(ds, grad_tile, warp * 16, value_tile, lane);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const int seen = (causal ? min(lk, row + 8 * half + 1) : lk) - key - lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
          const int at = 2 * half + e;
          const float p = 8 * j + e < seen ? exp2_of(scores[0].at[j][at] * (scale * LOG2E) - shift[half]) : 0.f;
          ds[0].at[j][at] = p * (ds[0].at[j][at] - centre[half]) * scale;
        }
    }
    add_product(out, ds, key_tile, lane);
    __syncthreads();
  }
  out[0].write(dq, queries, heads, first + warp * 16, 1.f, 1.f, lane);
}

// dv = the sum over queries of P dy, dk that of dS q: the same scores with keys as rows.
KERNEL_OF(COUNT, attention_flash_backward_kv)(T *dk, T *dv, const T *dy, const float *lse, const float *delta, const T *q, const T *k,
                                              const T *v, int heads, int lq, int lk, int d, int causal, float scale) {
  const Side queries(q, lq, heads, d), grads(dy, lq, heads, d), keys(k, lk, heads, d), values(v, lk, heads, d);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.x * OWN, key = first + warp * 16 + lane / 4;
  const uint32_t key_tile = shared_address(shared), value_tile = key_tile + OWN * ROW_BYTES, stages = value_tile + OWN * ROW_BYTES;
  // Two stages of lse in powers of two and delta, behind the tiles.
  float *rows = reinterpret_cast<float *>(shared + 2 * OWN * ROW_BYTES + 4 * BLOCK * ROW_BYTES);
  const auto copy_stage = [&](int stage, int query) {
    if (query < lq) {
      queries.copy<BLOCK>(stages + stage * 2 * BLOCK * ROW_BYTES, query);
      grads.copy<BLOCK>(stages + (stage * 2 + 1) * BLOCK * ROW_BYTES, query);
      const int i = threadIdx.x % BLOCK;
      const int64_t at = int64_t(blockIdx.y) * lq + query + i;
      const bool present = query + i < lq;
      if (threadIdx.x < BLOCK) rows[stage * 2 * BLOCK + i] = present ? lse[at] * LOG2E : -MASKED;
      else rows[(stage * 2 + 1) * BLOCK + i] = present ? delta[at] : 0.f;
    }
    copies_commit();
  };
  const int start = causal ? first / BLOCK * BLOCK : 0;
  if (start < lq) { // else no query sees these keys, and nothing would wait for the copies
    keys.copy<OWN>(key_tile, first);
    values.copy<OWN>(value_tile, first);
  }
  copy_stage(0, start);
  Strip dkey[1], dvalue[1];
  int stage = 0;
#pragma unroll 1
  for (int query = start; query < lq; query += BLOCK, stage ^= 1) {
    copy_stage(stage ^ 1, query + BLOCK);
    copies_wait<1>();
    __syncthreads();
    const uint32_t query_tile = stages + stage * 2 * BLOCK * ROW_BYTES, grad_tile = query_tile + BLOCK * ROW_BYTES;
    const float *shifts = rows + stage * 2 * BLOCK, *centres = shifts + BLOCK;
    Strip p[1], ds[1];
    add_scores(p, key_tile, warp * 16, query_tile, lane);
    add_scores(ds, value_tile, warp * 16, grad_tile, lane);
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int column = 8 * j + lane % 4 * 2 + e;
        const float shift = shifts[column], centre = centres[column];
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const int at = 2 * half + e;
          const bool seen = !causal || key + 8 * half <= query + column;
          float &probability = p[0].at[j][at], &gradient = ds[0].at[j][at];
          probability = seen ? exp2_of(probability * (scale * LOG2E) - shift) : 0.f;
          gradient = probability * (gradient - centre) * scale;
        }
      }
    add_product(dvalue, p, grad_tile, lane);
    add_product(dkey, ds, query_tile, lane);
    __syncthreads();
  }
  dkey[0].write(dk, keys, heads, first + warp * 16, 1.f, 1.f, lane);
  dvalue[0].write(dv, keys, heads, first + warp * 16, 1.f, 1.f, lane);
}

#endif

// ---- pieces for every head. A warp has a row; `z` counts the heads of all images.

// delta[z, row] = the sum of dy * y over a head.
KERNEL(attention_delta)(float *delta, const T *dy, const T *y, int heads, int lq, int d, int rows) {
  const int job = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (job >= rows) return;
  const int z = job / lq, row = job % lq;
  const int64_t at = (int64_t(z / heads) * lq + row) * heads * d + z % heads * d;
  float total = 0;
#pragma unroll 1
  for (int i = lane; i < d; i += 32) total += to_float(dy[at + i]) * to_float(y[at + i]);
  total = warp_sum(total);
  if (lane == 0) delta[job] = total;
}

// Rows [first, first + rows) of every head: scores [z, rows, lk] become probabilities [z, rows, stride], zero past lk.
KERNEL(attention_softmax)(T *p, float *lse, const float *scores, int heads, int rows, int first, int lq, int lk, int stride, int causal,
                          float scale) {
  const int job = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (job >= heads * rows) return;
  const int row = first + job % rows, seen = causal ? min(lk, row + 1) : lk;
  const float *from = scores + int64_t(job) * lk;
  T *to = p + int64_t(job) * stride;
  float most = MASKED, total = 0;
#pragma unroll 1
  for (int i = lane; i < seen; i += 32) most = fmaxf(most, from[i]);
  most = warp_max(most);
#pragma unroll 1
  for (int i = lane; i < seen; i += 32) total += expf((from[i] - most) * scale);
  total = warp_sum(total);
  const float inverse = 1.f / total;
#pragma unroll 1
  for (int i = lane; i < stride; i += 32) to[i] = from_float<T>(i < seen ? expf((from[i] - most) * scale) * inverse : 0.f);
  if (lane == 0) lse[int64_t(job / rows) * lq + row] = most * scale + logf(total);
}

// Of scores and dP = dy v, both [z, rows, keys] from (first_row, first_key) on: P and dS = scale P (dP - delta), zero past
// the last key.
KERNEL(attention_gradients)(T *p, T *ds, const float *scores, const float *dp, const float *lse, const float *delta, int heads, int rows,
                            int keys, int first_row, int first_key, int lq, int stride, int causal, float scale) {
  const int job = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (job >= heads * rows) return;
  const int row = first_row + job % rows, seen = causal ? min(keys, row + 1 - first_key) : keys;
  const int64_t from = int64_t(job) * keys, to = int64_t(job) * stride, at = int64_t(job / rows) * lq + row;
  const float shift = lse[at], centre = delta[at];
#pragma unroll 1
  for (int i = lane; i < stride; i += 32) {
    const float value = i < seen ? expf(scores[from + i] * scale - shift) : 0.f;
    p[to + i] = from_float<T>(value);
    ds[to + i] = from_float<T>(i < seen ? value * (dp[from + i] - centre) * scale : 0.f);
  }
}
