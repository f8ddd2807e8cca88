// One step of Adafactor (Shazeer & Stern 2018) as transformers' with a given learning rate. A matrix [outer, rows, columns,
// inner] keeps the means of its squared gradients over columns and over rows, per outer and inner: a linear layer is one
// matrix of inner 1, a convolution [o, kh, kw, i] has one of kh x kw for each pair of channels. The update's root mean
// square is needed before the first weight changes, so a step is several launches (engine/cuda/plan_adafactor.ts).
#include "optimizer.cuh"

DEVICE float moment(float old, float mean, float beta2, float one_minus_beta2) { return old * beta2 + one_minus_beta2 * mean; }

DEVICE float squared(float g, float eps) { return g * g + eps; }

// row[o, r, i]: a warp takes a row of inner 1, a thread a row of each of many small matrices.
KERNEL(adafactor_rows)(float *row, const T *gradient, int outer, int rows, int columns, int inner, float gradient_scale, float beta2,
                       float one_minus_beta2, float eps) {
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x, lanes = inner == 1 ? 32 : 1, lane = thread % lanes;
  for (uint32_t job = thread / lanes; job < uint32_t(outer) * rows * inner; job += gridDim.x * THREADS / lanes) {
    const T *from = gradient + int64_t(job / inner) * columns * inner + job % inner;
    float total = 0;
#pragma unroll 1
    for (int c = lane; c < columns; c += lanes) total += squared(to_float(from[int64_t(c) * inner]) * gradient_scale, eps);
    if (inner == 1) total = warp_sum(total);
    if (lane == 0) row[job] = moment(row[job], total / float(columns), beta2, one_minus_beta2);
  }
}

// partial[o, chunk, c, i]: the sums of squares over `length` rows.
KERNEL(adafactor_columns_partial)(float *partial, const T *gradient, int outer, int rows, int width, int length, int chunks,
                                  float gradient_scale, float eps) {
  for (uint32_t job = blockIdx.x * THREADS + threadIdx.x; job < uint32_t(outer) * chunks * width; job += gridDim.x * THREADS) {
    const uint32_t chunk = job / width % chunks, o = job / width / chunks, start = chunk * length;
    const int count = min(length, rows - int(start));
    const T *from = gradient + (int64_t(o) * rows + start) * width + job % width;
    float total = 0;
#pragma unroll 2
    for (int r = 0; r < count; r++) total += squared(to_float(from[int64_t(r) * width]) * gradient_scale, eps);
    partial[job] = total;
  }
}

// col[o, c, i] from those sums; `width` is columns times inner.
KERNEL(adafactor_columns)(float *col, const float *partial, int outer, int rows, int width, int chunks, float beta2, float one_minus_beta2) {
  for (uint32_t job = blockIdx.x * THREADS + threadIdx.x; job < uint32_t(outer) * width; job += gridDim.x * THREADS) {
    const float *from = partial + int64_t(job / width) * chunks * width + job % width;
    float total = 0;
#pragma unroll 2
    for (int chunk = 0; chunk < chunks; chunk++) total += from[int64_t(chunk) * width];
    col[job] = moment(col[job], total / float(rows), beta2, one_minus_beta2);
  }
}

// means[o, i]: the mean over rows of row[o, r, i], a warp to each.
KERNEL(adafactor_means)(float *means, const float *row, int outer, int rows, int inner) {
  const uint32_t thread = blockIdx.x * THREADS + threadIdx.x, lane = thread % 32;
  for (uint32_t job = thread / 32; job < uint32_t(outer) * inner; job += gridDim.x * THREADS / 32) {
    const float *from = row + int64_t(job / inner) * rows * inner + job % inner;
    float total = 0;
#pragma unroll 1
    for (int r = lane; r < rows; r += 32) total += from[int64_t(r) * inner];
    total = warp_sum(total);
    if (lane == 0) means[job] = total / float(rows);
  }
}

// What divides a gradient, as its reciprocal: from the two factored moments, or from a vector's own.
struct Factored {
  const float *row, *col, *means;
  uint32_t rows, columns, inner;
  __device__ float at(uint32_t place) const {
    const uint32_t i = place % inner, c = place / inner % columns, line = place / inner / columns, o = line / rows;
    return 1.f / sqrtf(row[line * inner + i] / means[o * inner + i]) * (1.f / sqrtf(col[(o * columns + c) * inner + i]));
  }
};
struct Whole {
  const float *exp_avg_sq;
  __device__ float at(uint32_t place) const { return 1.f / sqrtf(exp_avg_sq[place]); }
};

constexpr int SQUARES_CHUNK = 8192;

// partial[chunk] = the sum of the squared updates of SQUARES_CHUNK elements.
template <class F> DEVICE void update_squares(float *partial, const T *gradient, uint32_t n, float gradient_scale, const F &factor) {
  __shared__ float scratch[THREADS / 32];
  const uint32_t chunks = (n + SQUARES_CHUNK - 1) / SQUARES_CHUNK;
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t end = min(n, (chunk + 1) * SQUARES_CHUNK);
    float total = 0;
#pragma unroll 1
    for (uint32_t i = chunk * SQUARES_CHUNK + threadIdx.x; i < end; i += THREADS) {
      const float u = to_float(gradient[i]) * gradient_scale * factor.at(i);
      total += u * u;
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[chunk] = total;
    __syncthreads();
  }
}

KERNEL(adafactor_squares)(float *partial, const T *gradient, const float *row, const float *col, const float *means, int outer, int rows,
                          int columns, int inner, float gradient_scale) {
  const Factored factor = {row, col, means, uint32_t(rows), uint32_t(columns), uint32_t(inner)};
  update_squares(partial, gradient, uint32_t(outer) * rows * columns * inner, gradient_scale, factor);
}

// Takes the squared gradients into exp_avg_sq; the squares of the updates are summed in the next launch.
KERNEL(adafactor_vector_moments)(float *exp_avg_sq, const T *gradient, int n, float gradient_scale, float beta2, float one_minus_beta2,
                                 float eps) {
  each_pack(n, [=](uint32_t i, int count) {
    const Pack g = load(gradient + i, count);
    Pack v = load(exp_avg_sq + i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) v.at[j] = moment(v.at[j], squared(g.at[j] * gradient_scale, eps), beta2, one_minus_beta2);
    store(exp_avg_sq + i, v, count);
  });
}
KERNEL(adafactor_vector_squares)(float *partial, const T *gradient, const float *exp_avg_sq, int n, float gradient_scale) {
  update_squares(partial, gradient, uint32_t(n), gradient_scale, Whole{exp_avg_sq});
}

// size[0] = lr / max(1, rms / clip_threshold): one block.
KERNEL(adafactor_size)(float *size, const float *partial, int chunks, int n, float lr, float clip_threshold) {
  const double total = joined(partial, chunks);
  if (threadIdx.x > 0) return;
  const double excess = sqrt(total / double(n)) / double(clip_threshold);
  size[0] = float(double(lr) / (excess > 1 ? excess : 1));
}

template <class F>
DEVICE void apply(const Weights &weights, const T *gradient, const float *size, int n, float gradient_scale, float decay, const F &factor) {
  const float step = size[0];
  each_pack(n, [=](uint32_t i, int count) {
    const Pack g = load(gradient + i, count);
    Pack w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++)
      if (j < count) w.at[j] = w.at[j] * decay - step * (g.at[j] * gradient_scale * factor.at(i + j));
    weights.write(i, w, count);
  });
}

KERNEL(adafactor_apply)(T *weight, float *master, const T *gradient, const float *row, const float *col, const float *means,
                        const float *size, int outer, int rows, int columns, int inner, float gradient_scale, float decay, ROUNDING) {
  const Factored factor = {row, col, means, uint32_t(rows), uint32_t(columns), uint32_t(inner)};
  apply(WEIGHTS, gradient, size, outer * rows * columns * inner, gradient_scale, decay, factor);
}
KERNEL(adafactor_vector_apply)(T *weight, float *master, const T *gradient, const float *exp_avg_sq, const float *size, int n,
                               float gradient_scale, float decay, ROUNDING) {
  apply(WEIGHTS, gradient, size, n, gradient_scale, decay, Whole{exp_avg_sq});
}
