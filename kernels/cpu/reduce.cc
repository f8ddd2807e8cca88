// Sum over one axis of [outer, axis, inner], its transpose, and the training losses. Sums run in index order within
// fixed chunks, so the result does not depend on the number of threads.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class T> void sum_forward(T *y, const T *x, int outer, int axis, int inner) {
  constexpr int WIDTH = 64;
  const int blocks = (inner + WIDTH - 1) / WIDTH;
  parallel_for(int64_t(outer) * blocks, 1 + GRAIN / (int64_t(axis) * WIDTH), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t o = job / blocks;
      const int first = int(job % blocks) * WIDTH;
      const int width = inner - first < WIDTH ? inner - first : WIDTH;
      float total[WIDTH] = {0};
      for (int a = 0; a < axis; a++) {
        const T *row = x + (o * axis + a) * int64_t(inner) + first;
        for (int i = 0; i < width; i++) total[i] += to_float(row[i]);
      }
      for (int i = 0; i < width; i++) y[o * inner + first + i] = from_float<T>(total[i]);
    }
  });
}

template <class T> void broadcast_forward(T *y, const T *x, int outer, int axis, int inner) {
  parallel_for(int64_t(outer) * axis, 1 + GRAIN / inner, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int i = 0; i < inner; i++) y[r * inner + i] = x[r / axis * inner + i];
  });
}

struct Squared {
  static float f(float r, float) { return r * r; }
  static float df(float r, float) { return 2.f * r; }
};
struct Huber {
  static float f(float r, float delta) {
    const float a = fabsf(r);
    return a <= delta ? 0.5f * r * r : delta * (a - 0.5f * delta);
  }
  static float df(float r, float delta) { return r > delta ? delta : r < -delta ? -delta : r; }
};

template <class L, class T>
void loss(float *y, const T *prediction, const T *target, const float *weights, int n, int inner, float delta) {
  double total = 0;
  for (int image = 0; image < n; image++) {
    double mine = 0;
    for (int64_t i = int64_t(image) * inner; i < int64_t(image + 1) * inner; i++)
      mine += L::f(to_float(prediction[i]) - to_float(target[i]), delta);
    total += (weights ? weights[image] : 1.f) * mine / inner;
  }
  y[0] = float(total / n);
}

template <class L, class T>
void loss_backward(T *dprediction, const float *dy, const T *prediction, const T *target, const float *weights, int n, int inner,
                   float delta) {
  parallel_for(int64_t(n) * inner, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const float share = dy[0] * (weights ? weights[i / inner] : 1.f) / (float(n) * float(inner));
      dprediction[i] = from_float<T>(share * L::df(to_float(prediction[i]) - to_float(target[i]), delta));
    }
  });
}

template <class T> void mse_forward(float *y, const T *p, const T *t, const float *w, int n, int inner) {
  loss<Squared>(y, p, t, w, n, inner, 0);
}
template <class T> void mse_backward(T *dp, const float *dy, const T *p, const T *t, const float *w, int n, int inner) {
  loss_backward<Squared>(dp, dy, p, t, w, n, inner, 0);
}
template <class T> void huber_forward(float *y, const T *p, const T *t, const float *w, int n, int inner, float delta) {
  loss<Huber>(y, p, t, w, n, inner, delta);
}
template <class T>
void huber_backward(T *dp, const float *dy, const T *p, const T *t, const float *w, int n, int inner, float delta) {
  loss_backward<Huber>(dp, dy, p, t, w, n, inner, delta);
}

EXPORT_FLOATS(sum_forward, sum_forward)
EXPORT_FLOATS(broadcast_forward, broadcast_forward)
EXPORT_FLOATS(mse_forward, mse_forward)
EXPORT_FLOATS(mse_backward, mse_backward)
EXPORT_FLOATS(huber_forward, huber_forward)
EXPORT_FLOATS(huber_backward, huber_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
