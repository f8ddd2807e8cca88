// Layer norm and softmax over rows, a warp to a row; and the launches that join what chunks of rows have summed for the gradients
// of a norm's weight and bias.
#include "norm.cuh"

extern __shared__ __align__(16) float shared[];

// sums[i, k] = the sum over chunks, in order, of partial[i, chunk, k]: for i images and k places.
KERNEL(norm_sum_chunks)(float *sums, const float *partial, int images, int chunks, int places) {
  const int job = blockIdx.x * THREADS + threadIdx.x;
  if (job >= images * places) return;
  const float *from = partial + int64_t(job / places) * chunks * places + job % places;
  float total = 0;
#pragma unroll 2
  for (int chunk = 0; chunk < chunks; chunk++) total += from[int64_t(chunk) * places];
  sums[job] = total;
}

// dweight and dbias: the sums over images of sums[n, 2, c], where they are wanted.
KERNEL(norm_backward_weight)(T *dweight, T *dbias, const float *sums, int images, int c) {
  const int k = blockIdx.x * THREADS + threadIdx.x;
  if (k >= c) return;
  float bias = 0, weight = 0;
#pragma unroll 1
  for (int i = 0; i < images; i++) {
    bias += sums[int64_t(i) * 2 * c + k];
    weight += sums[int64_t(i) * 2 * c + c + k];
  }
  if (dweight) dweight[k] = from_float<T>(weight);
  if (dbias) dbias[k] = from_float<T>(bias);
}
constexpr int WARP_PACK = 32 * PACK; // elements of a row that a warp takes at once

// A lane's share of a row. With N > 0 it is N packs in registers, in storage type and all on their way at once, of a row of
// whole packs (640, 768 and 1280 in SDXL); with 0 any number, each read again where it is used.
template <int N> struct Row {
  const T *from;
  int c;
  Stored<T> kept[N > 0 ? N : 1];

  __device__ Row(const T *from, int c) : from(from), c(c) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (place(i) < c) kept[i] = *reinterpret_cast<const Stored<T> *>(from + place(i));
  }
  __device__ static int place(int i) { return i * WARP_PACK + threadIdx.x % 32 * PACK; }
  // The pack at k, the i-th of this lane.
  __device__ Pack at(int i, int k) const {
    if constexpr (N == 0) return load(from + k, c - k, c % PACK == 0);
    Pack x;
#pragma unroll
    for (int j = 0; j < PACK; j++) x.at[j] = to_float(kept[i].at[j]);
    return x;
  }
};

// body(i, k, count) for each pack of a lane: its number, place, and how many elements of it lie in the row.
template <int N, class F> DEVICE void each_pack_of(int c, F &&body) {
  if constexpr (N > 0) {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (Row<N>::place(i) < c) body(i, Row<N>::place(i), PACK);
  } else {
#pragma unroll 1
    for (int k = Row<N>::place(0); k < c; k += WARP_PACK) body(0, k, c - k);
  }
}

// Calls f<N> for the N that holds rows of c.
#define FOR_ROWS_OF(c, f, ...)                                                    \
  if (c % PACK == 0 && c <= 5 * WARP_PACK) f<5>(__VA_ARGS__);                     \
  else if (c % PACK == 0 && c <= 10 * WARP_PACK) f<10>(__VA_ARGS__);              \
  else f<0>(__VA_ARGS__)

DEVICE int own_row() { return (blockIdx.x * THREADS + threadIdx.x) / 32; }

template <int N> DEVICE void normalise(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int c, float eps) {
  const bool aligned = N > 0 || c % PACK == 0;
  const Row<N> row(x, c);
  float total = 0, spread = 0;
  each_pack_of<N>(c, [&](int i, int k, int) {
    const Pack in = row.at(i, k);
    total += (in.at[0] + in.at[1]) + (in.at[2] + in.at[3]);
  });
  const float mu = warp_sum(total) / float(c);
  each_pack_of<N>(c, [&](int i, int k, int count) {
    const Pack in = row.at(i, k);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float d = j < count ? in.at[j] - mu : 0.f;
      spread += d * d;
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(spread) / float(c) + eps);
  each_pack_of<N>(c, [&](int i, int k, int count) {
    Pack value = row.at(i, k);
    const Pack w = load(weight + k, count, aligned), b = load(bias + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) value.at[j] = (value.at[j] - mu) * scale * w.at[j] + b.at[j];
    store(y + k, value, count, aligned);
  });
  if (threadIdx.x % 32 == 0) {
    *mean = mu;
    *rstd = scale;
  }
}

KERNEL(layer_norm_forward)(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int rows, int c, float eps) {
  const int row = own_row();
  if (row >= rows) return;
  const int64_t first = int64_t(row) * c;
  FOR_ROWS_OF(c, normalise, y + first, mean + row, rstd + row, x + first, weight, bias, c, eps);
}

template <int N> DEVICE void normalise_backward(T *dx, const T *dy, const T *x, const T *weight, float mu, float scale, int c) {
  const bool aligned = N > 0 || c % PACK == 0;
  const Row<N> row(x, c), grad(dy, c);
  float centre = 0, slope = 0;
  each_pack_of<N>(c, [&](int i, int k, int count) {
    const Pack in = row.at(i, k), g = grad.at(i, k), w = load(weight + k, count, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) { // past the end g is 0
      centre += g.at[j] * w.at[j];
      slope += g.at[j] * w.at[j] * ((in.at[j] - mu) * scale);
    }
  });
  centre = warp_sum(centre) / float(c);
  slope = warp_sum(slope) / float(c);
  each_pack_of<N>(c, [&](int i, int k, int count) {
    const Pack in = row.at(i, k), w = load(weight + k, count, aligned);
    Pack g = grad.at(i, k);
#pragma unroll
    for (int j = 0; j < PACK; j++) g.at[j] = scale * (g.at[j] * w.at[j] - centre - (in.at[j] - mu) * scale * slope);
    store(dx + k, g, count, aligned);
  });
}

KERNEL(layer_norm_backward_x)(T *dx, const T *dy, const T *x, const T *weight, const float *mean, const float *rstd, int rows, int c) {
  const int row = own_row();
  if (row >= rows) return;
  const int64_t first = int64_t(row) * c;
  FOR_ROWS_OF(c, normalise_backward, dx + first, dy + first, x + first, weight, mean[row], rstd[row], c);
}

// partial[chunk, 2, c]: the sums over a chunk of rows of dy and of dy times the normalised x.
KERNEL(layer_norm_backward_partial)(float *partial, const T *dy, const T *x, const float *mean, const float *rstd, int total, int c, int rows) {
  const Columns columns(c);
  const int start = blockIdx.x * rows, count = min(rows, total - start);
  float *sums = shared, *products = shared + columns.lanes * c;
  if (columns.lane < columns.lanes)
#pragma unroll 1
    for (int p = columns.column; p < columns.packs; p += columns.width) {
      const int k = p * PACK;
      Pack sum = {}, product = {};
#pragma unroll 2
      for (int r = start + columns.lane; r < start + count; r += columns.lanes) {
        const int64_t at = int64_t(r) * c + k;
        const Pack g = load(dy + at, c - k, columns.aligned), in = load(x + at, c - k, columns.aligned);
        const float mu = mean[r], scale = rstd[r];
#pragma unroll
        for (int j = 0; j < PACK; j++) {
          sum.at[j] += g.at[j];
          product.at[j] += g.at[j] * ((in.at[j] - mu) * scale);
        }
      }
      store(sums + columns.lane * c + k, sum, c - k, columns.aligned);
      store(products + columns.lane * c + k, product, c - k, columns.aligned);
    }
  __syncthreads();
  for (int k = threadIdx.x; k < c; k += THREADS) {
    partial[int64_t(blockIdx.x) * 2 * c + k] = lane_sum(sums, columns, k);
    partial[int64_t(blockIdx.x) * 2 * c + c + k] = lane_sum(products, columns, k);
  }
}

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
