// Sum over one axis of [outer, axis, inner], its transpose, and the training losses. Sums run in index order within
// fixed chunks, so the result does not depend on the number of threads.
#include "each.h"

namespace sdxl {
namespace ARCH {
namespace {

// total[inner] = the sum of `rows` rows of x. A single column is summed along its vectors instead.
template <class T> void add_rows(float *total, const T *x, int64_t rows, int64_t inner) {
  if (inner == 1) {
    vf lanes = {};
    for (int64_t i = 0; i < rows; i += LANES) lanes += load(x + i, rows - i);
    total[0] = reduce_add(lanes);
    return;
  }
  for (int64_t first = 0; first < inner; first += LANES) {
    vf lanes = {};
    for (int64_t row = 0; row < rows; row++) lanes += load(x + row * inner + first, inner - first);
    store(total + first, lanes, inner - first);
  }
}

// Each chunk of the axis is summed by itself, then the chunks in order: the cut depends on the shape alone.
template <class T> void sum_forward(T *y, const T *x, int outer, int axis, int inner) {
  const int64_t length = 64 + GRAIN / (int64_t(inner) + 1), chunks = axis > 0 ? (axis + length - 1) / length : 1;
  Floats partial(int64_t(outer) * chunks * inner);
  const int64_t work = (axis < length ? axis : length) * inner;
  parallel_for(outer * chunks, rows_per_range(work), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t o = job / chunks, start = job % chunks * length;
      const int64_t rows = axis - start < length ? axis - start : length;
      add_rows(partial.data + job * inner, x + (o * axis + start) * inner, rows, inner);
    }
  });
  parallel_for(outer, rows_per_range(chunks * inner), [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++)
      for (int64_t i = 0; i < inner; i += LANES) {
        vf total = {};
        for (int64_t k = 0; k < chunks; k++) total += load(partial.data + (o * chunks + k) * inner + i, inner - i);
        store(y + o * inner + i, total, inner - i);
      }
  });
}

template <class T> void broadcast_forward(T *y, const T *x, int outer, int axis, int inner) {
  parallel_for(int64_t(outer) * axis, rows_per_range(inner), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *from = x + r / axis * inner;
      T *to = y + r * inner;
      if (inner == 1) *to = *from;
      else memcpy(to, from, sizeof(T) * size_t(inner));
    }
  });
}

struct Squared {
  static vf f(vf r, float) { return r * r; }
  static vf df(vf r, float) { return 2.f * r; }
};
// torch's huber_loss: quadratic within delta, linear beyond.
struct Huber {
  static vf f(vf r, float delta) {
    const vf a = r < 0.f ? -r : r;
    return a <= delta ? 0.5f * r * r : delta * (a - 0.5f * delta);
  }
  static vf df(vf r, float delta) {
    const vf low = r < -delta ? splat(-delta) : r;
    return low > delta ? splat(delta) : low;
  }
};

template <class L, class T> float loss_of(const T *prediction, const T *target, int64_t count, float delta) {
  vf total = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const vf term = L::f(load(prediction + i, count - i) - load(target + i, count - i), delta);
    total += term; // lanes past the end hold 0 - 0, whose loss is 0
  }
  return reduce_add(total);
}

template <class L, class T>
void loss(float *y, const T *prediction, const T *target, const float *weights, int n, int inner, float delta) {
  constexpr int64_t LENGTH = 1024; // short enough for float32 partial sums even at 4 lanes
  const int64_t chunks = (inner + LENGTH - 1) / LENGTH;
  Floats partial(n * chunks);
  parallel_for(n * chunks, rows_per_range(inner < LENGTH ? inner : LENGTH), [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t start = job % chunks * LENGTH, at = job / chunks * inner + start;
      partial.data[job] = loss_of<L>(prediction + at, target + at, inner - start < LENGTH ? inner - start : LENGTH, delta);
    }
  });
  double total = 0;
  for (int64_t job = 0; job < n * chunks; job++) total += double(partial.data[job]) * (weights ? weights[job / chunks] : 1.f);
  y[0] = float(total / (double(n) * inner));
}

template <class L, class T>
void loss_backward(T *dprediction, const float *dy, const T *prediction, const T *target, const float *weights, int n, int inner,
                   float delta) {
  const int64_t blocks = (inner + GRAIN - 1) / GRAIN;
  parallel_for(n * blocks, rows_per_range(inner < GRAIN ? inner : GRAIN), [=](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t image = job / blocks, start = job % blocks * GRAIN;
      const int64_t stop = inner - start < GRAIN ? inner : start + GRAIN;
      const float share = float(double(dy[0]) * (weights ? weights[image] : 1.f) / (double(n) * inner));
      for (int64_t i = start; i < stop; i += LANES) {
        const int64_t at = image * inner + i;
        store(dprediction + at, share * L::df(load(prediction + at, stop - i) - load(target + at, stop - i), delta), stop - i);
      }
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
