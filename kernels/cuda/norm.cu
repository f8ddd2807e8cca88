// Layer norm and softmax over rows, a warp to a row; and the launch that joins what chunks of rows have summed for the gradients of a
// norm's weight and bias.
#include "norm.cuh"

extern __shared__ __align__(16) float shared[];

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

DEVICE int own_row() { return (blockIdx.x * THREADS + threadIdx.x) / 32; }

// body(k, count) for each pack of a lane in a row of c: its place, and how many elements of it lie in the row.
template <int UNROLL, class F> DEVICE void each_pack_of(int c, F &&body) {
#pragma unroll UNROLL
  for (int k = threadIdx.x % 32 * PACK; k < c; k += 32 * PACK) body(k, c - k);
}

// A row of any length, read again where it is used.
DEVICE void normalise(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int c, float eps) {
  const bool aligned = c % PACK == 0;
  float total = 0, spread = 0;
  each_pack_of<1>(c, [&](int k, int count) {
    const Pack in = load(x + k, count, aligned);
    total += (in.at[0] + in.at[1]) + (in.at[2] + in.at[3]);
  });
  const float mu = warp_sum(total) / float(c);
  each_pack_of<1>(c, [&](int k, int count) {
    const Pack in = load(x + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float d = j < count ? in.at[j] - mu : 0.f;
      spread += d * d;
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(spread) / float(c) + eps);
  each_pack_of<1>(c, [&](int k, int count) {
    Pack value = load(x + k, count, aligned);
    const Pack w = load(weight + k, count, aligned), b = load(bias + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) value.at[j] = (value.at[j] - mu) * scale * w.at[j] + b.at[j];
    store(y + k, value, count, aligned);
  });
  if (threadIdx.x % 32 == 0) *mean = mu, *rstd = scale;
}

// The same for rows of whole chunks, at most N of them to a lane (640, 768 and 1280 elements in SDXL): all of a row is on its way at
// once, and beside it the block's weight and bias to shared memory, so that nothing is asked for after the sums.
template <int N>
DEVICE void normalise_kept(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, bool has_row, int c, float eps) {
  const int place = threadIdx.x % 32 * CHUNK;
  T *weights = reinterpret_cast<T *>(shared), *biases = weights + c;
  Chunk in[N];
  const auto each = [&](auto &&body) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (has_row && i * 32 * CHUNK + place < c) body(in[i], i * 32 * CHUNK + place);
  };
  each([&](Chunk &own, int k) { own = chunk_at(x + k); });
  for (int k = threadIdx.x * CHUNK; k < c; k += THREADS * CHUNK) {
    copy_async(shared_address(weights + k), weight + k, true);
    copy_async(shared_address(biases + k), bias + k, true);
  }
  copies_commit();
  float total = 0, spread = 0;
  each([&](const Chunk &own, int) {
#pragma unroll
    for (int j = 0; j < CHUNK; j += 2) total += own.at(j) + own.at(j + 1);
  });
  const float mu = warp_sum(total) / float(c);
  each([&](const Chunk &own, int) {
#pragma unroll
    for (int j = 0; j < CHUNK; j++) {
      const float d = own.at(j) - mu;
      spread += d * d;
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(spread) / float(c) + eps);
  copies_wait<0>();
  __syncthreads();
  each([&](const Chunk &own, int k) {
    const Chunk w = chunk_at(weights + k), b = chunk_at(biases + k);
    float value[CHUNK];
#pragma unroll
    for (int j = 0; j < CHUNK; j++) value[j] = (own.at(j) - mu) * scale * w.at(j) + b.at(j);
    put_chunk(y + k, value);
  });
  if (has_row && threadIdx.x % 32 == 0) *mean = mu, *rstd = scale;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) JOIN(layer_norm_forward, DTYPE)(T *y, float *mean, float *rstd, const T *x, const T *weight,
                                                                                        const T *bias, int rows, int c, float eps) {
  const int row = own_row();
  const int64_t first = int64_t(row) * c;
  if (c % CHUNK == 0 && c <= 768)
    normalise_kept<768 / (32 * CHUNK)>(y + first, mean + row, rstd + row, x + first, weight, bias, row < rows, c, eps);
  else if (c % CHUNK == 0 && c <= 1280)
    normalise_kept<1280 / (32 * CHUNK)>(y + first, mean + row, rstd + row, x + first, weight, bias, row < rows, c, eps);
  else if (row < rows) normalise(y + first, mean + row, rstd + row, x + first, weight, bias, c, eps);
}

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
extern "C" __global__ void __launch_bounds__(THREADS, 4) JOIN(layer_norm_backward_staged, DTYPE)(GRADIENTS) {
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
