// Sum over one axis of [outer, axis, inner], its transpose, and the training losses. A long axis is cut into chunks that
// are summed apart and then in order; the cut depends on the shape alone (engine/cuda/plan_reduce.ts), so sums repeat bit for bit.
#include "wide.cuh"

// Of rows, where inner is 1: y[o] = the sum of x[o, start .. start + length], a warp to each.
template <class Out, class In> DEVICE void sum_rows(Out *y, const In *x, int outer, int axis, int length, int chunks) {
  const uint32_t warps = gridDim.x * blockDim.x / 32;
  for (uint32_t job = (blockIdx.x * blockDim.x + threadIdx.x) / 32; job < uint32_t(outer) * chunks; job += warps) {
    const int start = int(job % chunks) * length, rows = min(length, axis - start);
    const In *from = x + job / chunks * axis + start;
    float total = 0;
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < rows; i += 32) total += to_float(from[i]);
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) y[job] = from_float<Out>(total);
  }
}

KERNEL(sum_rows)(T *y, const T *x, int outer, int axis) { sum_rows(y, x, outer, axis, axis, 1); }

// partial[outer, chunks], each chunk `length` long.
KERNEL(sum_rows_partial)(float *partial, const T *x, int outer, int axis, int length, int chunks) {
  sum_rows(partial, x, outer, axis, length, chunks);
}

KERNEL(sum_rows_finish)(T *y, const float *partial, int outer, int chunks) { sum_rows(y, partial, outer, chunks, chunks, 1); }

// Of columns: y[o, i] = the sum of x[o, .., i], or partial[chunk, o, i] that of rows start .. start + length. A block
// has `width` runs of N neighbours side by side, and its other threads are lanes that take every so many-th row, AHEAD
// of them on their way at a time. Rows past the end are the last one again, as a zero. Lanes are joined pair by pair.
constexpr int AHEAD = 8;

template <class Out, int N> DEVICE void store_run(Out *to, const float (&run)[N]) {
  if constexpr (N == 1) *to = from_float<Out>(run[0]);
  else
#pragma unroll
    for (int j = 0; j < N; j += PACK) store(to + j, Pack{{run[j], run[j + 1], run[j + 2], run[j + 3]}}, PACK);
}

template <int N, class In> DEVICE void sum_columns(T *y, float *partial, const In *x, int outer, int axis, int inner, int length, int width) {
  __shared__ float scratch[N][THREADS];
  const uint32_t across = inner / N, runs = outer * across, run = blockIdx.x * width + threadIdx.x % width;
  const int lane = threadIdx.x / width, lanes = THREADS / width, start = blockIdx.y * length;
  const int rows = run < runs ? min(length, axis - start) : 0;
  const In *from = x + (run / across * axis + start) * inner + run % across * N;
  float total[N] = {};
#pragma unroll 1
  for (int row = lane; row < rows; row += AHEAD * lanes) {
    Neighbours<In, N> part[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) part[i] = Neighbours<In, N>(from + uint32_t(min(row + i * lanes, rows - 1)) * inner);
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      part[i].clear_unless(row + i * lanes < rows);
#pragma unroll
      for (int j = 0; j < N; j++) total[j] += part[i].at(j);
    }
  }
#pragma unroll 1
  for (int half = lanes / 2; half > 0; half /= 2) {
    if (lane >= half && lane < 2 * half)
#pragma unroll
      for (int j = 0; j < N; j++) scratch[j][threadIdx.x] = total[j];
    __syncthreads();
    if (lane < half)
#pragma unroll
      for (int j = 0; j < N; j++) total[j] += scratch[j][threadIdx.x + half * width];
  }
  if (lane > 0 || run >= runs) return;
  const uint32_t place = (blockIdx.y * runs + run) * N;
  if (partial != nullptr) store_run(partial + place, total);
  else store_run(y + place, total);
}

KERNEL(sum_columns)(T *y, float *partial, const T *x, int outer, int axis, int inner, int length, int width) {
  if (inner % WIDE<T> == 0) sum_columns<WIDE<T>>(y, partial, x, outer, axis, inner, length, width);
  else sum_columns<1>(y, partial, x, outer, axis, inner, length, width);
}

KERNEL(sum_columns_finish)(T *y, const float *partial, int chunks, int columns, int width) {
  if (columns % WIDE<float> == 0) sum_columns<WIDE<float>>(y, nullptr, partial, 1, chunks, columns, chunks, width);
  else sum_columns<1>(y, nullptr, partial, 1, chunks, columns, chunks, width);
}

KERNEL(broadcast_forward)(T *y, const T *x, int outer, int axis, int inner) {
  const bool aligned = inner % PACK == 0;
  const int packs = (inner + PACK - 1) / PACK;
  const uint32_t jobs = uint32_t(outer) * axis * packs;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < jobs; job += gridDim.x * blockDim.x) {
    const int i = int(job % packs) * PACK;
    const uint32_t r = job / packs;
    store(y + r * inner + i, load(x + r / axis * inner + i, inner - i, aligned), inner - i, aligned);
  }
}

// ---- losses over [n, inner]: a block sums LOSS_CHUNK elements of one image

constexpr int LOSS_CHUNK = 4096;

struct Squared {
  static __device__ float f(float r, float) { return r * r; }
  static __device__ float df(float r, float) { return 2.f * r; }
};
// torch's huber_loss: quadratic within delta, linear beyond.
struct Huber {
  static __device__ float f(float r, float delta) {
    const float a = fabsf(r);
    return a <= delta ? 0.5f * r * r : delta * (a - 0.5f * delta);
  }
  // By comparisons: fminf and fmaxf would make a NaN finite.
  static __device__ float df(float r, float delta) { return r < -delta ? -delta : r > delta ? delta : r; }
};

template <class L> DEVICE void loss_partial(float *partial, const T *prediction, const T *target, int n, int inner, float delta) {
  __shared__ float scratch[THREADS / 32];
  const int chunks = (inner + LOSS_CHUNK - 1) / LOSS_CHUNK;
  const bool aligned = inner % PACK == 0;
  for (uint32_t job = blockIdx.x; job < uint32_t(n) * chunks; job += gridDim.x) {
    const int start = int(job % chunks) * LOSS_CHUNK, count = min(LOSS_CHUNK, inner - start);
    const uint32_t at = job / chunks * inner + start;
    float total = 0;
    for (int i = threadIdx.x * PACK; i < count; i += blockDim.x * PACK) {
      const Pack p = load(prediction + at + i, count - i, aligned), q = load(target + at + i, count - i, aligned);
#pragma unroll
      for (int j = 0; j < PACK; j++) total += L::f(p.at[j] - q.at[j], delta); // past the end both are 0
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[job] = total;
    __syncthreads();
  }
}

// One thread adds the chunks in order: there are few, and their number does not depend on the device.
KERNEL(loss_finish)(float *y, const float *partial, const float *weights, int n, int inner) {
  const int chunks = (inner + LOSS_CHUNK - 1) / LOSS_CHUNK;
  double total = 0;
  for (uint32_t job = 0; job < uint32_t(n) * chunks; job++) total += double(partial[job]) * double(weights ? weights[job / chunks] : 1.f);
  y[0] = float(total / (double(n) * inner));
}

template <class L>
DEVICE void loss_backward(T *dprediction, const float *dy, const T *prediction, const T *target, const float *weights, int n, int inner,
                          float delta) {
  const bool aligned = inner % PACK == 0;
  const int packs = (inner + PACK - 1) / PACK;
  const double whole = double(dy[0]) / (double(n) * inner);
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < uint32_t(n) * packs; job += gridDim.x * blockDim.x) {
    const int i = int(job % packs) * PACK;
    const uint32_t at = job / packs * inner + i;
    const float share = float(whole * double(weights ? weights[job / packs] : 1.f));
    Pack p = load(prediction + at, inner - i, aligned);
    const Pack q = load(target + at, inner - i, aligned);
#pragma unroll
    for (int j = 0; j < PACK; j++) p.at[j] = share * L::df(p.at[j] - q.at[j], delta);
    store(dprediction + at, p, inner - i, aligned);
  }
}

KERNEL(mse_partial)(float *partial, const T *prediction, const T *target, int n, int inner, float) {
  loss_partial<Squared>(partial, prediction, target, n, inner, 0.f);
}
KERNEL(huber_partial)(float *partial, const T *prediction, const T *target, int n, int inner, float delta) {
  loss_partial<Huber>(partial, prediction, target, n, inner, delta);
}
KERNEL(mse_backward)(T *dp, const float *dy, const T *p, const T *t, const float *w, int n, int inner) {
  loss_backward<Squared>(dp, dy, p, t, w, n, inner, 0.f);
}
KERNEL(huber_backward)(T *dp, const float *dy, const T *p, const T *t, const float *w, int n, int inner, float delta) {
  loss_backward<Huber>(dp, dy, p, t, w, n, inner, delta);
}
