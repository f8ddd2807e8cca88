// Kernels that move elements: lookup, slice, place, permute, nearest upsampling, and the sinusoids of the timestep.
// A tensor has fewer than 2^31 elements, so places are 32-bit: 64-bit divisions are long.
#include "common.cuh"

// to[0, count) = from[0, count), by the whole block.
DEVICE void copy_row(T *to, const T *from, int count, bool aligned) {
  for (int i = threadIdx.x * PACK; i < count; i += blockDim.x * PACK) {
    const int left = min(PACK, count - i);
    if (aligned && left == PACK) *reinterpret_cast<Stored<T> *>(to + i) = *reinterpret_cast<const Stored<T> *>(from + i);
    else {
#pragma unroll 1
      for (int j = 0; j < left; j++) to[i + j] = from[i + j];
    }
  }
}

KERNEL(embedding_forward)(T *y, const T *weight, const int *ids, int rows, int c) {
  for (int r = blockIdx.x; r < rows; r += gridDim.x) copy_row(y + int64_t(r) * c, weight + int64_t(ids[r]) * c, c, c % PACK == 0);
}

// A block to an id: it looks for its rows in order, so that an id's gradient is one float32 sum.
KERNEL(embedding_backward)(T *dweight, const T *dy, const int *ids, int rows, int c, int v) {
  const bool aligned = c % PACK == 0;
  for (int id = blockIdx.x; id < v; id += gridDim.x)
    for (int i = threadIdx.x * PACK; i < c; i += blockDim.x * PACK) {
      Pack total = {};
#pragma unroll 2
      for (int r = 0; r < rows; r++) {
        if (ids[r] != id) continue;
        const Pack g = load(dy + int64_t(r) * c + i, c - i, aligned);
#pragma unroll
        for (int j = 0; j < PACK; j++) total.at[j] += g.at[j];
      }
      store(dweight + int64_t(id) * c + i, total, c - i, aligned);
    }
}

// copy(which run, first element, how many) over `outer` runs, in pieces, so that a single long run still fills the grid.
template <class F> DEVICE void each_run(uint32_t outer, uint32_t run, F &&copy) {
  constexpr uint32_t PIECE = 4096;
  const uint32_t pieces = (run + PIECE - 1) / PIECE;
  for (uint32_t job = blockIdx.x; job < outer * pieces; job += gridDim.x) {
    const uint32_t start = job % pieces * PIECE;
    copy(job / pieces, start, min(PIECE, run - start));
  }
}

KERNEL(slice_forward)(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const uint32_t run = uint32_t(length) * inner;
  const bool aligned = inner % PACK == 0;
  each_run(outer, run, [=](uint32_t o, uint32_t at, int count) {
    copy_row(y + o * run + at, x + (o * axis + start) * inner + at, count, aligned);
  });
}

KERNEL(place_forward)(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const uint32_t run = uint32_t(length) * inner;
  const bool aligned = inner % PACK == 0;
  each_run(outer, run, [=](uint32_t o, uint32_t at, int count) {
    copy_row(y + (o * axis + start) * inner + at, x + o * run + at, count, aligned);
  });
}

// Through squares of 32 x 32 of the last two dims in shared memory: whichever of the two strides is 1, reads and writes
// both run along memory. The block is 32 x 8 threads; its column of padding keeps the banks apart.
KERNEL(permute_forward)(T *y, const T *x, int d0, int d1, int d2, int d3, int s0, int s1, int s2, int s3) {
  constexpr int SIDE = 32, STEP = THREADS / SIDE;
  __shared__ T square[SIDE][SIDE + 1];
  const int across = (d3 + SIDE - 1) / SIDE, down = (d2 + SIDE - 1) / SIDE;
  const int column = threadIdx.x % SIDE, row = threadIdx.x / SIDE;
  for (uint32_t job = blockIdx.x; job < uint32_t(d0) * d1 * down * across; job += gridDim.x) {
    const int e0 = int(job % across) * SIDE, c0 = int(job / across % down) * SIDE;
    const uint32_t r = job / across / down;
    const T *from = x + (r / d1) * s0 + (r % d1) * s1;
    // Where dim 2 is the contiguous one of x, it is the one that neighbouring threads read along.
    const bool turned = s3 != 1;
#pragma unroll 1
    for (int i = row; i < SIDE; i += STEP) {
      const int c = turned ? c0 + column : c0 + i, e = turned ? e0 + i : e0 + column;
      if (c < d2 && e < d3) square[c - c0][e - e0] = from[c * s2 + e * s3];
    }
    __syncthreads();
#pragma unroll 1
    for (int i = row; i < SIDE; i += STEP)
      if (c0 + i < d2 && e0 + column < d3) y[(r * d2 + c0 + i) * d3 + e0 + column] = square[i][column];
    __syncthreads();
  }
}

KERNEL(upsample_nearest_forward)(T *y, const T *x, int n, int h, int w, int c, int oh, int ow) {
  const bool aligned = c % PACK == 0;
  const int packs = (c + PACK - 1) / PACK;
  const uint32_t total = uint32_t(n) * oh * ow * packs;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < total; job += gridDim.x * blockDim.x) {
    const int k = int(job % packs) * PACK, j = int(job / packs % ow);
    const uint32_t r = job / packs / ow;
    const uint32_t row = (r / oh) * h + (r % oh) * h / oh;
    store(y + (r * ow + j) * c + k, load(x + (row * w + j * w / ow) * c + k, c - k, aligned), c - k, aligned);
  }
}

// Pixel (2 i + a, 2 j + b) of y is (i, j) of quarter 2 a + b; the quarters have `rows` rows, of all images.
KERNEL(join_quarters_forward)(T *y, const T *q0, const T *q1, const T *q2, const T *q3, int rows, int w, int c) {
  const bool aligned = c % PACK == 0;
  const int packs = (c + PACK - 1) / PACK;
  const uint32_t total = uint32_t(rows) * 4 * w * packs;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < total; job += gridDim.x * blockDim.x) {
    const int k = int(job % packs) * PACK;
    const uint32_t pixel = job / packs, row = pixel / (2 * w), column = pixel - row * 2 * w;
    const T *quarter = row & 1 ? (column & 1 ? q3 : q2) : (column & 1 ? q1 : q0);
    store(y + pixel * c + k, load(quarter + (row / 2 * w + column / 2) * c + k, c - k, aligned), c - k, aligned);
  }
}

// The first output that reads input `i`, of `out` outputs over `in` inputs: the least j with floor(j in / out) >= i.
DEVICE int first_reader(int i, int in, int out) { return (i * out + in - 1) / in; }

KERNEL(upsample_nearest_backward)(T *dx, const T *dy, int n, int h, int w, int c, int oh, int ow) {
  const bool aligned = c % PACK == 0;
  const int packs = (c + PACK - 1) / PACK;
  const uint32_t total = uint32_t(n) * h * w * packs;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < total; job += gridDim.x * blockDim.x) {
    const int k = int(job % packs) * PACK, column = int(job / packs % w), row = int(job / packs / w % h);
    const uint32_t image = job / packs / w / h;
    const int bottom = first_reader(row + 1, h, oh), right = first_reader(column + 1, w, ow);
    Pack sum = {};
#pragma unroll 1
    for (int i = first_reader(row, h, oh); i < bottom; i++)
#pragma unroll 1
      for (int j = first_reader(column, w, ow); j < right; j++) {
        const Pack g = load(dy + ((image * oh + i) * ow + j) * c + k, c - k, aligned);
#pragma unroll
        for (int p = 0; p < PACK; p++) sum.at[p] += g.at[p];
      }
    store(dx + job / packs * c + k, sum, c - k, aligned);
  }
}

// diffusers' get_timestep_embedding, rounded to float32 where it rounds: frequencies, then angles. An odd dim ends in 0.
// The angle is taken back to one turn in double by hand: the library's own reduction for large angles is a long subroutine.
KERNEL(timestep_embedding_forward)(T *y, const float *t, int n, int dim, int flip_sin_to_cos, float shift, float max_period) {
  const int half = dim / 2;
  const float rate = float(-log(double(max_period)));
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < uint32_t(n) * (half + 1); job += gridDim.x * blockDim.x) {
    const uint32_t i = job / (half + 1);
    const int j = int(job % (half + 1));
    T *row = y + i * dim;
    if (j == half) {
      if (dim % 2) row[dim - 1] = from_float<T>(0.f);
      continue;
    }
    const double angle = double(t[i] * float(exp(double(rate * float(j) / (float(half) - shift)))));
    const double turns = rint(angle * 0.15915494309189535);
    const double rest = fma(-turns, 2.4492935982947064e-16, fma(-turns, 6.283185307179586, angle));
    double sine, cosine;
    sincospi(rest * 0.3183098861837907, &sine, &cosine);
    row[j + (flip_sin_to_cos ? half : 0)] = from_float<T>(float(sine));
    row[j + (flip_sin_to_cos ? 0 : half)] = from_float<T>(float(cosine));
  }
}
