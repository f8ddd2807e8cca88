// Layer norm and softmax over rows, a warp to a row; and the launch that joins what chunks of rows have summed for the gradients of a
// norm's weight and bias.
#include "layer_norm.cuh"

// A block of norm_join takes 16 columns: a thread two of them and every 32nd row, eight rows on their way at once.
constexpr int JOIN_COLUMNS = 16, JOIN_ROWS = 2 * THREADS / JOIN_COLUMNS, JOIN_AHEAD = 8;

// dbias and dweight, where they are wanted: the sums over images and rows of partial[images, rows, 2, c], in a fixed order. Each
// image's own go to sums[images, 2, c] where that is wanted.
KERNEL(norm_join)(T *dweight, T *dbias, float *sums, const float *partial, int images, int rows, int c) {
  __shared__ float parts[JOIN_ROWS][JOIN_COLUMNS];
  const int places = 2 * c, column = threadIdx.x % (JOIN_COLUMNS / 2) * 2, row = threadIdx.x / (JOIN_COLUMNS / 2);
  const int k = blockIdx.x * JOIN_COLUMNS + column, own = blockIdx.x * JOIN_COLUMNS + threadIdx.x;
  const bool joins = threadIdx.x < JOIN_COLUMNS && own < places;
  float all = 0;
#pragma unroll 1
  for (int image = 0; image < images; image++) {
    float2 total = {0, 0};
#pragma unroll 1
    for (int r = row; k < places && r < rows; r += JOIN_AHEAD * JOIN_ROWS) {
      float2 in[JOIN_AHEAD];
#pragma unroll
      for (int i = 0; i < JOIN_AHEAD; i++) {
        const int at = r + i * JOIN_ROWS;
        in[i] = at < rows ? *reinterpret_cast<const float2 *>(partial + (int64_t(image) * rows + at) * places + k) : float2{0, 0};
      }
#pragma unroll
      for (int i = 0; i < JOIN_AHEAD; i++) total.x += in[i].x, total.y += in[i].y;
    }
    parts[row][column] = total.x, parts[row][column + 1] = total.y;
    __syncthreads();
    if (joins) {
      float sum = 0;
#pragma unroll
      for (int r = 0; r < JOIN_ROWS; r++) sum += parts[r][threadIdx.x];
      if (sums) sums[int64_t(image) * places + own] = sum;
      all += sum;
    }
    __syncthreads();
  }
  if (!joins) return;
  T *to = own < c ? dbias : dweight;
  if (to) to[own < c ? own : own - c] = from_float<T>(all);
}

LAYER_NORM_KERNEL(layer_norm_forward)(LAYER_NORM) { layer_norm(y, mean, rstd, x, weight, bias, rows, c, eps); }

// Layer norm's gradients. A block takes `share` rows, eight at a time: a warp writes dx of each, and then a thread to a pack of columns
// adds to their sums of dy and of dy times the normalised x, in shared memory, which no other thread touches. They end as
// partial[block, 2, c]; dx and partial may both be absent. STAGED, the rows are brought to shared memory first, all of them at once,
// as both readings are of them. dx = rstd (dy w - mean(dy w) - h mean(dy w h)) with h = (x - mean) rstd.
template <bool STAGED>
DEVICE void gradients(T *dx, float *partial, const T *dy, const T *x, const T *weight, const float *mean, const float *rstd, int total, int c, int share) {
  constexpr int ROWS = THREADS / 32;
  __shared__ float2 moments[ROWS];
  const bool aligned = STAGED || c % PACK == 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start = blockIdx.x * share, end = min(total, start + share);
  float *sums = shared, *products = shared + c;
  T *staged_weight = reinterpret_cast<T *>(products + c), *staged_x = staged_weight + c, *staged_dy = staged_x + ROWS * c;
  const auto each_column = [&](auto &&body) {
#pragma unroll 1
    for (int k = threadIdx.x * PACK; k < c; k += THREADS * PACK) body(k, c - k);
  };
  each_column([&](int k, int count) {
    store(sums + k, Pack{}, count, aligned);
    store(products + k, Pack{}, count, aligned);
  });
  if (STAGED)
    for (int k = threadIdx.x * CHUNK; k < c; k += THREADS * CHUNK) copy_async(shared_address(staged_weight + k), weight + k, true);
#pragma unroll 1
  for (int first = start; first < end; first += ROWS) {
    const int row = first + warp, rows = min(ROWS, end - first);
    const int64_t at = int64_t(row) * c;
    if (row < end) {
      if (STAGED)
#pragma unroll 1
        for (int k = lane * CHUNK; k < c; k += 32 * CHUNK) {
          copy_async(shared_address(staged_x + warp * c + k), x + at + k, true);
          copy_async(shared_address(staged_dy + warp * c + k), dy + at + k, true);
        }
      if (lane == 0) moments[warp] = {mean[row], rstd[row]};
    }
    if (STAGED) copies_commit(), copies_wait<0>();
    __syncthreads();
    if (dx && row < end) {
      const T *in = STAGED ? staged_x + warp * c : x + at, *grads = STAGED ? staged_dy + warp * c : dy + at, *weights = STAGED ? staged_weight : weight;
      const float mu = moments[warp].x, scale = moments[warp].y;
      float centre = 0, slope = 0;
      each_pack_of<STAGED ? 2 : 1>(c, [&](int k, int count) {
        const Pack value = load(in + k, count, aligned), g = load(grads + k, count, aligned), w = load(weights + k, count, aligned);
#pragma unroll
        for (int j = 0; j < PACK; j++) { // past the end g is 0
          const float gw = g.at[j] * w.at[j];
          centre += gw;
          slope += gw * (value.at[j] - mu);
        }
      });
      centre = warp_sum(centre) / float(c) * scale;
      slope = warp_sum(slope) / float(c) * scale * scale * scale;
      each_pack_of<STAGED ? 2 : 1>(c, [&](int k, int count) {
        const Pack value = load(in + k, count, aligned), w = load(weights + k, count, aligned);
        Pack g = load(grads + k, count, aligned);
#pragma unroll
        for (int j = 0; j < PACK; j++) g.at[j] = g.at[j] * w.at[j] * scale - centre - (value.at[j] - mu) * slope;
        store(dx + at + k, g, count, aligned);
      });
    }
    if (partial)
      each_column([&](int k, int count) {
        Pack sum = load(sums + k, count, aligned), product = load(products + k, count, aligned);
        const T *in = STAGED ? staged_x + k : x + int64_t(first) * c + k, *grads = STAGED ? staged_dy + k : dy + int64_t(first) * c + k;
#pragma unroll(STAGED ? 2 : 1)
        for (int r = 0; r < rows; r++) {
          const Pack value = load(in + r * c, count, aligned), g = load(grads + r * c, count, aligned);
          const float mu = moments[r].x, scale = moments[r].y;
#pragma unroll
          for (int j = 0; j < PACK; j++) {
            sum.at[j] += g.at[j];
            product.at[j] += g.at[j] * ((value.at[j] - mu) * scale);
          }
        }
        store(sums + k, sum, count, aligned);
        store(products + k, product, count, aligned);
      });
    __syncthreads(); // before the next rows
  }
  if (partial)
    each_column([&](int k, int count) {
      float *to = partial + int64_t(blockIdx.x) * 2 * c + k;
      store(to, load(sums + k, count, aligned), count, aligned);
      store(to + c, load(products + k, count, aligned), count, aligned);
    });
}
#define GRADIENTS T *dx, float *partial, const T *dy, const T *x, const T *weight, const float *mean, const float *rstd, int total, int c, int share
LAYER_NORM_KERNEL(layer_norm_backward_staged)(GRADIENTS) {
  gradients<true>(dx, partial, dy, x, weight, mean, rstd, total, c, share);
}
KERNEL(layer_norm_backward_rows)(GRADIENTS) { gradients<false>(dx, partial, dy, x, weight, mean, rstd, total, c, share); }

// Softmax over a whole row stands in few models: lanes take single elements.
KERNEL(softmax_forward)(T *y, const T *x, int rows, int c) {
  const int row = own_row(), lane = threadIdx.x % 32;
  if (row >= rows) return;
  const T *from = x + int64_t(row) * c;
  float most = to_float(from[0]), total = 0;
#pragma unroll 2
  for (int k = lane; k < c; k += 32) most = fmaxf(most, to_float(from[k]));
  most = warp_max(most);
#pragma unroll 2
  for (int k = lane; k < c; k += 32) total += expf(to_float(from[k]) - most);
  const float inverse = 1.f / warp_sum(total);
#pragma unroll 2
  for (int k = lane; k < c; k += 32) y[int64_t(row) * c + k] = from_float<T>(expf(to_float(from[k]) - most) * inverse);
}

KERNEL(softmax_backward)(T *dx, const T *dy, const T *y, int rows, int c) {
  const int row = own_row(), lane = threadIdx.x % 32;
  if (row >= rows) return;
  const int64_t first = int64_t(row) * c;
  float dot = 0;
#pragma unroll 2
  for (int k = lane; k < c; k += 32) dot += to_float(dy[first + k]) * to_float(y[first + k]);
  dot = warp_sum(dot);
#pragma unroll 2
  for (int k = lane; k < c; k += 32) dx[first + k] = from_float<T>(to_float(y[first + k]) * (to_float(dy[first + k]) - dot));
}
