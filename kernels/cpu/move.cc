// Kernels that move elements: lookup, slice, place, permute, nearest upsampling, and the sinusoids of the timestep.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class T> void embedding_forward(T *y, const T *weight, const int32_t *ids, int rows, int c) {
  for (int r = 0; r < rows; r++) memcpy(y + int64_t(r) * c, weight + int64_t(ids[r]) * c, sizeof(T) * size_t(c));
}

// The rows of each id are chained in order, so that an id's gradient is one float32 sum, whatever the threads.
template <class T> void embedding_backward(T *dweight, const T *dy, const int32_t *ids, int rows, int c, int v) {
  int32_t *first = new int32_t[size_t(v)], *next = new int32_t[size_t(rows)];
  for (int id = 0; id < v; id++) first[id] = -1;
  for (int r = rows - 1; r >= 0; r--) {
    next[r] = first[ids[r]];
    first[ids[r]] = r;
  }
  parallel_for(v, rows_per_range(c), [=](int64_t begin, int64_t end) {
    for (int64_t id = begin; id < end; id++)
      for (int64_t i = 0; i < c; i += LANES) {
        vf total = {};
        for (int64_t r = first[id]; r >= 0; r = next[r]) total += load(dy + r * c + i, c - i);
        store(dweight + id * c + i, total, c - i);
      }
  });
  delete[] first;
  delete[] next;
}

template <class T> void slice_forward(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const size_t run = size_t(length) * inner;
  parallel_for(outer, rows_per_range(int64_t(run)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) memcpy(y + o * run, x + (o * axis + start) * inner, run * sizeof(T));
  });
}

template <class T> void place_forward(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const size_t run = size_t(length) * inner;
  parallel_for(outer, rows_per_range(int64_t(run)), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) memcpy(y + (o * axis + start) * inner, x + o * run, run * sizeof(T));
  });
}

// The last two dims go in squares of TILE: whichever of the two strides is 1, both sides stay in the first cache.
template <class T>
void permute_forward(T *y, const T *x, int d0, int d1, int d2, int d3, int s0, int s1, int s2, int s3) {
  constexpr int64_t TILE = 32;
  const int64_t bands = (d2 + TILE - 1) / TILE;
  parallel_for(int64_t(d0) * d1 * bands, rows_per_range(TILE * d3), [=](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t r = job / bands, c0 = job % bands * TILE, c1 = c0 + TILE < d2 ? c0 + TILE : d2;
      const T *from = x + (r / d1) * s0 + (r % d1) * s1;
      T *to = y + r * d2 * d3;
      if (s3 == 1) {
        for (int64_t c = c0; c < c1; c++) memcpy(to + c * d3, from + c * s2, sizeof(T) * size_t(d3));
        continue;
      }
      for (int64_t e0 = 0; e0 < d3; e0 += TILE)
        for (int64_t c = c0; c < c1; c++)
          for (int64_t e = e0; e < d3 && e < e0 + TILE; e++) to[c * d3 + e] = from[c * s2 + e * s3];
    }
  });
}

template <class T> void upsample_nearest_forward(T *y, const T *x, int n, int h, int w, int c, int oh, int ow) {
  parallel_for(int64_t(n) * oh, rows_per_range(int64_t(ow) * c), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t row = (r / oh) * h + (r % oh) * h / oh;
      for (int64_t j = 0; j < ow; j++) memcpy(y + (r * ow + j) * c, x + (row * w + j * w / ow) * c, sizeof(T) * size_t(c));
    }
  });
}

// Pixel (2 i + a, 2 j + b) of y is (i, j) of quarter 2 a + b; the quarters have `rows` rows, of all images.
template <class T> void join_quarters_forward(T *y, const T *q0, const T *q1, const T *q2, const T *q3, int rows, int w, int c) {
  const T *quarters[] = {q0, q1, q2, q3};
  parallel_for(2 * int64_t(rows), rows_per_range(2 * int64_t(w) * c), [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++)
      for (int64_t column = 0; column < 2 * int64_t(w); column++) {
        const T *from = quarters[row % 2 * 2 + column % 2] + (row / 2 * w + column / 2) * c;
        memcpy(y + (row * 2 * w + column) * c, from, sizeof(T) * size_t(c));
      }
  });
}

// The first output that reads input `i`, of `out` outputs over `in` inputs: the least j with floor(j in / out) >= i.
inline int64_t first_reader(int64_t i, int64_t in, int64_t out) { return (i * out + in - 1) / in; }

template <class T> void upsample_nearest_backward(T *dx, const T *dy, int n, int h, int w, int c, int oh, int ow) {
  parallel_for(int64_t(n) * h, rows_per_range(int64_t(w) * c), [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin * w; pixel < end * w; pixel++) {
      const int64_t image = pixel / w / h, row = pixel / w % h, column = pixel % w;
      const int64_t bottom = first_reader(row + 1, h, oh), right = first_reader(column + 1, w, ow);
      for (int64_t k = 0; k < c; k += LANES) {
        vf total = {};
        for (int64_t i = first_reader(row, h, oh); i < bottom; i++)
          for (int64_t j = first_reader(column, w, ow); j < right; j++)
            total += load(dy + ((image * oh + i) * ow + j) * c + k, c - k);
        store(dx + pixel * c + k, total, c - k);
      }
    }
  });
}

// diffusers' get_timestep_embedding, rounded to float32 where it rounds: frequencies, then angles. An odd dim ends in 0.
template <class T>
void timestep_embedding_forward(T *y, const float *t, int n, int dim, int flip_sin_to_cos, float shift, float max_period) {
  const int half = dim / 2;
  const float rate = float(-__builtin_log(double(max_period)));
  for (int64_t i = 0; i < n; i++) {
    T *row = y + i * dim;
    for (int j = 0; j < half; j++) {
      const float angle = t[i] * float(__builtin_exp(double(rate * float(j) / (float(half) - shift))));
      row[j + (flip_sin_to_cos ? half : 0)] = from_float<T>(float(__builtin_sin(double(angle))));
      row[j + (flip_sin_to_cos ? 0 : half)] = from_float<T>(float(__builtin_cos(double(angle))));
    }
    if (dim % 2) row[dim - 1] = from_float<T>(0.f);
  }
}

EXPORT_FLOATS(embedding_forward, embedding_forward)
EXPORT_FLOATS(embedding_backward, embedding_backward)
EXPORT_FLOATS(slice_forward, slice_forward)
EXPORT_FLOATS(place_forward, place_forward)
EXPORT_FLOATS(permute_forward, permute_forward)
EXPORT_FLOATS(upsample_nearest_forward, upsample_nearest_forward)
EXPORT_FLOATS(join_quarters_forward, join_quarters_forward)
EXPORT_FLOATS(upsample_nearest_backward, upsample_nearest_backward)
EXPORT_FLOATS(timestep_embedding_forward, timestep_embedding_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
