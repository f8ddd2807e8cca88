// How attention's forward kernel came about, slow to fast. This file has the steps that the program does not use: a thread to
// a query, and one warpgroup on wgmma. Between them lies kernels/cuda/attention.cu (mma.sync, for every GPU since Ampere), after
// them kernels/cuda/attention_sm90.cu (three warpgroups). README.md beside this says what each is expected to reach.
// In bfloat16, heads 64 wide of [n, l, heads * 64].
#include "../cuda/attention_sm90.cuh"

// One thread keeps a query and its sums in registers and walks over the keys, which a warp reads as one. Plain fma does the
// work: 128 of them, and some fifty loads, conversions and steps of the softmax, for each query and key.
KERNEL_OF(WARPGROUP, lab_attention_threads)(T *y, float *lse, const T *q, const T *k, const T *v, int heads, int lq, int lk, float scale) {
  const int row = blockIdx.x * WARPGROUP + threadIdx.x, head = blockIdx.y % heads, image = blockIdx.y / heads, stride = heads * HEAD;
  if (row >= lq) return;
  const int64_t own = (int64_t(image) * lq + row) * stride + head * HEAD, other = int64_t(image) * lk * stride + head * HEAD;
  float query[HEAD], out[HEAD] = {}, most = MASKED, sum = 0;
#pragma unroll
  for (int i = 0; i < HEAD; i++) query[i] = to_float(q[own + i]);
#pragma unroll 1
  for (int key = 0; key < lk; key++) {
    const T *keys = k + other + int64_t(key) * stride, *values = v + other + int64_t(key) * stride;
    float score = 0;
#pragma unroll
    for (int i = 0; i < HEAD; i++) score += query[i] * to_float(keys[i]);
    const float next = fmaxf(most, score), shrink = exp2_of((most - next) * scale * LOG2E), weight = exp2_of((score - next) * scale * LOG2E);
#pragma unroll
    for (int i = 0; i < HEAD; i++) out[i] = out[i] * shrink + weight * to_float(values[i]);
    sum = sum * shrink + weight;
    most = next;
  }
#pragma unroll
  for (int i = 0; i < HEAD; i++) y[own + i] = from_float<T>(out[i] / sum);
  lse[int64_t(blockIdx.y) * lq + row] = most * scale + logf(sum);
}

// One warpgroup with 64 queries: it asks for a tile of keys and values, multiplies, takes the softmax, multiplies, and only
// then asks for the next. The tensor cores wait for the softmax, and both for the memory; other blocks fill some of the gaps.
extern "C" __global__ void __launch_bounds__(WARPGROUP)
    JOIN(lab_attention_warpgroup, DTYPE)(MAP map_q, MAP map_k, MAP map_v, MAP map_y, float *lse, int heads, int lq, int lk, float scale) {
  __shared__ uint64_t loaded;
  const uint32_t query_tile = shared_base(), key_tile = query_tile + HALF_TILE, value_tile = key_tile + TILE, staging = value_tile + TILE;
  const int column = blockIdx.y % heads * HEAD, image = blockIdx.y / heads, first = blockIdx.x * ROWS;
  const uint32_t barrier = shared_address(&loaded);
  if (threadIdx.x == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  const Place at;
  float scores[64], out[32] = {}, shrink[2];
  uint32_t weights[8][4];
  Running softmax;
#pragma unroll 1
  for (int key = 0; key < lk; key += 2 * ROWS) {
    __syncthreads();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect(barrier, (key == 0 ? HALF_TILE : 0) + 2 * TILE);
      if (key == 0) load_box(query_tile, map_q, barrier, column, first, image);
      load_box(key_tile, map_k, barrier, column, key, image);
      load_box(value_tile, map_v, barrier, column, key, image);
    }
    mbarrier_wait(barrier, key / (2 * ROWS) % 2);
    wgmma_fence();
    scores_of(scores, descriptor_along(query_tile), descriptor_along(key_tile));
    wgmma_commit();
    wgmma_wait<0>();
    hold(scores);
    if (key + 2 * ROWS > lk) mask(scores, lk - key, lk - key, at.lane);
    softmax.take(scores, shrink, scale * LOG2E);
    scale_rows(out, shrink[0], shrink[1]);
    round_all(weights, scores);
    hold(out);
    wgmma_fence();
    add_product(out, weights, descriptor_across<128>(value_tile, 0));
    wgmma_commit();
    wgmma_wait<0>();
    hold(out);
  }
  finish_rows(map_y, lse, staging, out, softmax, blockIdx.y % heads, blockIdx.y / heads, blockIdx.y, first, lq, scale, at);
  stores_wait_read<0>();
}
