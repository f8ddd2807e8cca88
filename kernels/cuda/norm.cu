// Group norm (+SiLU) over [n, hw, c], layer norm and softmax over rows. Group statistics are taken in one read: each chunk
// of rows sums about its own first row, which is one of the summed values and so bounds what cancels however far the mean
// lies from zero; chunks are then merged in a fixed tree (Chan, Golub & LeVeque 1983). Chunks depend on the shape alone
// (engine/cuda/plan.ts), so results repeat bit for bit.
#include "norm.cuh"

extern __shared__ __align__(16) float shared[];

// A block over rows of c channels: a thread keeps a pack of channels and walks every `lanes`-th row. Where a row has more
// packs than the block threads, a thread has several packs, one after another.
struct Columns {
  int c, packs, width, lanes, lane, column;
  bool aligned;
  __device__ explicit Columns(int c)
      : c(c), packs((c + PACK - 1) / PACK), width(min(packs, THREADS)), lanes(THREADS / width), lane(threadIdx.x / width),
        column(threadIdx.x % width), aligned(c % PACK == 0) {}
};

// to[k] = the sum over lanes, in order, of values[lane][k]; `values` holds [lanes][c].
DEVICE float lane_sum(const float *values, const Columns &columns, int k) {
  float total = 0;
#pragma unroll 1
  for (int lane = 0; lane < columns.lanes; lane++) total += values[lane * columns.c + k];
  return total;
}

// ---- group norm. A block takes `rows` rows of one image: blockIdx.x is the chunk, blockIdx.y the image.

// partial[image, chunk, group] = mean and squares about it. A pack of channels lies in x or in skip as a whole.
KERNEL(group_norm_partial)(float *partial, const T *x, const T *skip, int hw, int c, int own, int groups, int rows) {
  const Columns columns(c);
  const Image image = {x, skip, own, c};
  const int start = blockIdx.x * rows, count = min(rows, hw - start);
  const int64_t first = int64_t(blockIdx.y) * hw + start;
  float *sums = shared, *squares = shared + columns.lanes * c;
  if (columns.lane < columns.lanes)
#pragma unroll 1
    for (int p = columns.column; p < columns.packs; p += columns.width) {
      const int k = p * PACK;
      const T *from = image.at(first, k);
      const int stride = image.stride(k);
      const Pack shift = load(from, c - k, columns.aligned);
      Pack sum = {}, square = {};
#pragma unroll 4
      for (int r = columns.lane; r < count; r += columns.lanes) {
        const Pack in = load(from + int64_t(r) * stride, c - k, columns.aligned);
#pragma unroll
        for (int j = 0; j < PACK; j++) {
          const float d = in.at[j] - shift.at[j];
          sum.at[j] += d;
          square.at[j] += d * d;
        }
      }
      store(sums + columns.lane * c + k, sum, c - k, columns.aligned);
      store(squares + columns.lane * c + k, square, c - k, columns.aligned);
    }
  __syncthreads();
  // Channel by channel into the first lane's place: what other lanes left there is read by this thread alone.
  for (int k = threadIdx.x; k < c; k += THREADS) {
    const float sum = lane_sum(sums, columns, k), mean = sum / float(count);
    squares[k] = lane_sum(squares, columns, k) - sum * mean;
    sums[k] = to_float(*image.at(first, k)) + mean;
  }
  __syncthreads();
  const int width = c / groups;
  for (int g = threadIdx.x; g < groups; g += THREADS) {
    float total = 0, spread = 0;
#pragma unroll 1
    for (int k = g * width; k < (g + 1) * width; k++) total += sums[k];
    const float centre = total / float(width);
#pragma unroll 1
    for (int k = g * width; k < (g + 1) * width; k++) {
      const float d = sums[k] - centre;
      spread += squares[k] + float(count) * d * d;
    }
    float *to = partial + ((int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * groups + g) * 2;
    to[0] = centre;
    to[1] = spread;
  }
}

struct Moments {
  float rows, mean, squares;
};

// Two sets of rows as one; a set may be empty.
DEVICE Moments merge(const Moments &a, const Moments &b, int width) {
  const float rows = a.rows + b.rows, d = b.mean - a.mean, share = rows > 0 ? b.rows / rows : 0.f;
  return {rows, a.mean + d * share, a.squares + b.squares + d * d * a.rows * share * float(width)};
}

// A warp to each group of each image.
KERNEL(group_norm_finish)(float *mean, float *rstd, const float *partial, int n, int hw, int c, int groups, int rows, float eps) {
  const int job = (blockIdx.x * THREADS + threadIdx.x) / 32, lane = threadIdx.x % 32;
  if (job >= n * groups) return;
  const int image = job / groups, g = job % groups, chunks = (hw + rows - 1) / rows, width = c / groups;
  Moments all = {0, 0, 0};
#pragma unroll 2
  for (int chunk = lane; chunk < chunks; chunk += 32) {
    const float *from = partial + ((int64_t(image) * chunks + chunk) * groups + g) * 2;
    all = merge(all, {float(min(rows, hw - chunk * rows)), from[0], from[1]}, width);
  }
#pragma unroll 1
  for (int step = 1; step < 32; step *= 2) {
    const Moments other = {__shfl_down_sync(0xffffffffu, all.rows, step), __shfl_down_sync(0xffffffffu, all.mean, step),
                           __shfl_down_sync(0xffffffffu, all.squares, step)};
    all = merge(all, other, width);
  }
  if (lane > 0) return;
  mean[job] = all.mean;
  rstd[job] = 1.f / sqrtf(all.squares / (float(hw) * float(width)) + eps);
}

// What a thread needs to know of its four channels in one image.
struct Affine {
  Pack mean, rstd, weight, bias;
  __device__ Affine(const float *means, const float *rstds, const T *weights, const T *biases, int k, const Columns &columns, int groups)
      : weight(load(weights + k, columns.c - k, columns.aligned)), bias(load(biases + k, columns.c - k, columns.aligned)) {
    const int width = columns.c / groups;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const int g = blockIdx.y * groups + min((k + j) / width, groups - 1);
      mean.at[j] = means[g];
      rstd.at[j] = rstds[g];
    }
  }
};

KERNEL(group_norm_apply)(T *y, const float *mean, const float *rstd, const T *x, const T *skip, const T *weight, const T *bias, int hw,
                         int c, int own, int groups, int with_silu, int rows) {
  const Columns columns(c);
  const Image image = {x, skip, own, c};
  const int start = blockIdx.x * rows, count = min(rows, hw - start);
  const int64_t first = int64_t(blockIdx.y) * hw + start;
  if (columns.lane >= columns.lanes) return;
#pragma unroll 1
  for (int p = columns.column; p < columns.packs; p += columns.width) {
    const int k = p * PACK;
    const T *from = image.at(first, k);
    const int stride = image.stride(k);
    const Affine affine(mean, rstd, weight, bias, k, columns, groups);
    Pack factor, shift;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      factor.at[j] = affine.rstd.at[j] * affine.weight.at[j];
      shift.at[j] = affine.bias.at[j] - affine.mean.at[j] * factor.at[j];
    }
#pragma unroll 4
    for (int r = columns.lane; r < count; r += columns.lanes) {
      Pack value = load(from + int64_t(r) * stride, c - k, columns.aligned);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float z = value.at[j] * factor.at[j] + shift.at[j];
        value.at[j] = with_silu ? silu(z) : z;
      }
      store(y + (first + r) * c + k, value, c - k, columns.aligned);
    }
  }
}

// The normalised x and the gradient before SiLU, of one pack.
DEVICE void gradient_of(Pack &h, Pack &dz, const Pack &x, const Pack &dy, const Affine &affine, int with_silu) {
#pragma unroll
  for (int j = 0; j < PACK; j++) {
    h.at[j] = (x.at[j] - affine.mean.at[j]) * affine.rstd.at[j];
    dz.at[j] = dy.at[j];
    if (with_silu) {
      const float z = h.at[j] * affine.weight.at[j] + affine.bias.at[j], s = sigmoid(z);
      dz.at[j] *= s * (1.f + z * (1.f - s));
    }
  }
}

// partial[image, chunk, 2, c] = the sums of dz and of dz * h.
KERNEL(group_norm_backward_partial)(float *partial, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                                    const float *rstd, int hw, int c, int groups, int with_silu, int rows) {
  const Columns columns(c);
  const int start = blockIdx.x * rows, count = min(rows, hw - start);
  const int64_t first = (int64_t(blockIdx.y) * hw + start) * c;
  float *sums = shared, *products = shared + columns.lanes * c;
  if (columns.lane < columns.lanes)
#pragma unroll 1
    for (int p = columns.column; p < columns.packs; p += columns.width) {
      const int k = p * PACK;
      const Affine affine(mean, rstd, weight, bias, k, columns, groups);
      Pack sum = {}, product = {}, h, dz;
#pragma unroll 2
      for (int r = columns.lane; r < count; r += columns.lanes) {
        const int64_t at = first + int64_t(r) * c + k;
        gradient_of(h, dz, load(x + at, c - k, columns.aligned), load(dy + at, c - k, columns.aligned), affine, with_silu);
#pragma unroll
        for (int j = 0; j < PACK; j++) {
          sum.at[j] += dz.at[j];
          product.at[j] += dz.at[j] * h.at[j];
        }
      }
      store(sums + columns.lane * c + k, sum, c - k, columns.aligned);
      store(products + columns.lane * c + k, product, c - k, columns.aligned);
    }
  __syncthreads();
  float *to = partial + (int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * 2 * c;
  for (int k = threadIdx.x; k < c; k += THREADS) {
    to[k] = lane_sum(sums, columns, k);
    to[c + k] = lane_sum(products, columns, k);
  }
}

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

// dx = rstd * (dz w - mean(dz w) - h mean(dz w h)), the means over the group.
KERNEL(group_norm_backward_x)(T *dx, const float *sums, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                              const float *rstd, int hw, int c, int groups, int with_silu, int rows) {
  const Columns columns(c);
  const int start = blockIdx.x * rows, count = min(rows, hw - start), width = c / groups;
  const int64_t first = (int64_t(blockIdx.y) * hw + start) * c;
  float *means = shared, *slopes = shared + groups;
  const float *from = sums + int64_t(blockIdx.y) * 2 * c;
  for (int g = threadIdx.x; g < groups; g += THREADS) {
    float total = 0, product = 0;
#pragma unroll 1
    for (int k = g * width; k < (g + 1) * width; k++) {
      total += from[k] * to_float(weight[k]);
      product += from[c + k] * to_float(weight[k]);
    }
    means[g] = total / (float(hw) * float(width));
    slopes[g] = product / (float(hw) * float(width));
  }
  __syncthreads();
  if (columns.lane >= columns.lanes) return;
#pragma unroll 1
  for (int p = columns.column; p < columns.packs; p += columns.width) {
    const int k = p * PACK;
    const Affine affine(mean, rstd, weight, bias, k, columns, groups);
    Pack centre, slope, h, dz;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const int g = min((k + j) / width, groups - 1);
      centre.at[j] = means[g];
      slope.at[j] = slopes[g];
    }
#pragma unroll 2
    for (int r = columns.lane; r < count; r += columns.lanes) {
      const int64_t at = first + int64_t(r) * c + k;
      gradient_of(h, dz, load(x + at, c - k, columns.aligned), load(dy + at, c - k, columns.aligned), affine, with_silu);
#pragma unroll
      for (int j = 0; j < PACK; j++) dz.at[j] = affine.rstd.at[j] * (dz.at[j] * affine.weight.at[j] - centre.at[j] - h.at[j] * slope.at[j]);
      store(dx + at, dz, c - k, columns.aligned);
    }
  }
}

// ---- rows: a warp to a row

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
