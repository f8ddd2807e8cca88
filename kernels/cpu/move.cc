// Kernels that move elements: lookup, slice, place, permute, nearest upsampling, and the sinusoids of the timestep.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class T> void embedding_forward(T *y, const T *weight, const int32_t *ids, int rows, int c) {
  for (int r = 0; r < rows; r++) memcpy(y + int64_t(r) * c, weight + int64_t(ids[r]) * c, sizeof(T) * size_t(c));
}

// Columns are shared out, rows run in order: the sum of a repeated id does not depend on the threads.
template <class T> void embedding_backward(T *dweight, const T *dy, const int32_t *ids, int rows, int c, int v) {
  memset(dweight, 0, sizeof(T) * size_t(v) * size_t(c));
  parallel_for(c, 64, [&](int64_t begin, int64_t end) {
    for (int r = 0; r < rows; r++) {
      T *target = dweight + int64_t(ids[r]) * c;
      for (int64_t i = begin; i < end; i++)
        target[i] = from_float<T>(to_float(target[i]) + to_float(dy[int64_t(r) * c + i]));
    }
  });
}

template <class T> void slice_forward(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const size_t run = size_t(length) * inner;
  parallel_for(outer, 1 + GRAIN / int64_t(run), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) memcpy(y + o * run, x + (o * axis + start) * inner, run * sizeof(T));
  });
}

template <class T> void place_forward(T *y, const T *x, int outer, int axis, int start, int length, int inner) {
  const size_t run = size_t(length) * inner;
  parallel_for(outer, 1 + GRAIN / int64_t(run), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) memcpy(y + (o * axis + start) * inner, x + o * run, run * sizeof(T));
  });
}

template <class T>
void permute_forward(T *y, const T *x, int d0, int d1, int d2, int d3, int s0, int s1, int s2, int s3) {
  parallel_for(int64_t(d0) * d1, 1 + GRAIN / (int64_t(d2) * d3), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *from = x + (r / d1) * s0 + (r % d1) * s1;
      T *to = y + r * d2 * d3;
      for (int64_t c = 0; c < d2; c++)
        for (int64_t d = 0; d < d3; d++) to[c * d3 + d] = from[c * s2 + d * s3];
    }
  });
}

template <class T> void upsample_nearest_forward(T *y, const T *x, int n, int h, int w, int c, int oh, int ow) {
  parallel_for(int64_t(n) * oh, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t row = (r / oh) * h + (r % oh) * h / oh;
      for (int64_t j = 0; j < ow; j++) memcpy(y + (r * ow + j) * c, x + (row * w + j * w / ow) * c, sizeof(T) * size_t(c));
    }
  });
}

template <class T> void upsample_nearest_backward(T *dx, const T *dy, int n, int h, int w, int c, int oh, int ow) {
  parallel_for(int64_t(n) * h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const int64_t image = r / h, row = r % h;
      for (int64_t column = 0; column < w; column++)
        for (int k = 0; k < c; k++) {
          float total = 0;
          for (int64_t i = row * oh / h; i < oh && i * h / oh <= row; i++) {
            if (i * h / oh != row) continue;
            for (int64_t j = column * ow / w; j < ow && j * w / ow <= column; j++)
              if (j * w / ow == column) total += to_float(dy[((image * oh + i) * ow + j) * c + k]);
          }
          dx[(r * w + column) * c + k] = from_float<T>(total);
        }
    }
  });
}

template <class T>
void timestep_embedding_forward(T *y, const float *t, int n, int dim, int flip_sin_to_cos, float shift, float max_period) {
  const int half = dim / 2;
  for (int64_t i = 0; i < n; i++)
    for (int j = 0; j < half; j++) {
      const double angle = double(t[i]) * std::exp(-std::log(double(max_period)) * j / (half - double(shift)));
      y[i * dim + j + (flip_sin_to_cos ? half : 0)] = from_float<T>(float(std::sin(angle)));
      y[i * dim + j + (flip_sin_to_cos ? 0 : half)] = from_float<T>(float(std::cos(angle)));
    }
}

EXPORT_FLOATS(embedding_forward, embedding_forward)
EXPORT_FLOATS(embedding_backward, embedding_backward)
EXPORT_FLOATS(slice_forward, slice_forward)
EXPORT_FLOATS(place_forward, place_forward)
EXPORT_FLOATS(permute_forward, permute_forward)
EXPORT_FLOATS(upsample_nearest_forward, upsample_nearest_forward)
EXPORT_FLOATS(upsample_nearest_backward, upsample_nearest_backward)
EXPORT_FLOATS(timestep_embedding_forward, timestep_embedding_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
