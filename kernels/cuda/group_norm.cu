// Group norm (+SiLU) over [n, hw, c]. Its statistics are taken in one read: each chunk of rows sums about its own first row, which
// is one of the summed values and so bounds what cancels however far the mean lies from zero; chunks are then merged in a fixed
// tree (Chan, Golub & LeVeque 1983). Chunks depend on the shape alone (engine/cuda/plan_reduce.ts), so results repeat bit for bit.
#include "norm.cuh"

extern __shared__ __align__(16) float shared[];

// Eight lanes share a group's channels, so that no thread adds up a whole group alone.
constexpr int EIGHT = 8;
DEVICE float sum_of_eight(float x) {
#pragma unroll
  for (int lane = EIGHT / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}
// body(g, begin, end) by whole warps: a thread's channels of group g are every eighth from `begin`, none where there is no group g.
template <class F> DEVICE void each_group(int groups, int width, F &&body) {
#pragma unroll 1
  for (int first = 0; first < groups; first += THREADS / EIGHT) {
    const int g = first + threadIdx.x / EIGHT, lane = threadIdx.x % EIGHT;
    body(g, g * width + lane, g < groups ? (g + 1) * width : 0);
  }
}

// A block takes `rows` rows of one image: blockIdx.x is the chunk, blockIdx.y the image.

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
  each_group(groups, width, [&](int g, int begin, int end) {
    float total = 0, spread = 0;
#pragma unroll 2
    for (int k = begin; k < end; k += EIGHT) total += sums[k];
    const float centre = sum_of_eight(total) / float(width);
#pragma unroll 2
    for (int k = begin; k < end; k += EIGHT) {
      const float d = sums[k] - centre;
      spread += squares[k] + float(count) * d * d;
    }
    spread = sum_of_eight(spread);
    if (threadIdx.x % EIGHT || begin >= end) return;
    float *to = partial + ((int64_t(blockIdx.y) * gridDim.x + blockIdx.x) * groups + g) * 2;
    to[0] = centre;
    to[1] = spread;
  });
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
// dx = rstd * (dz w - mean(dz w) - h mean(dz w h)), the means over the group.
KERNEL(group_norm_backward_x)(T *dx, const float *sums, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                              const float *rstd, int hw, int c, int groups, int with_silu, int rows) {
  const Columns columns(c);
  const int start = blockIdx.x * rows, count = min(rows, hw - start), width = c / groups;
  const int64_t first = (int64_t(blockIdx.y) * hw + start) * c;
  float *means = shared, *slopes = shared + groups;
  const float *from = sums + int64_t(blockIdx.y) * 2 * c;
  each_group(groups, width, [&](int g, int begin, int end) {
    float total = 0, product = 0;
#pragma unroll 2
    for (int k = begin; k < end; k += EIGHT) {
      total += from[k] * to_float(weight[k]);
      product += from[c + k] * to_float(weight[k]);
    }
    total = sum_of_eight(total), product = sum_of_eight(product);
    if (threadIdx.x % EIGHT || begin >= end) return;
    means[g] = total / (float(hw) * float(width));
    slopes[g] = product / (float(hw) * float(width));
  });
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
