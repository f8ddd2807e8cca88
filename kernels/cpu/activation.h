// The activations of linear layers with their slopes, and dx[i] = dy[i] f'(x[i]).
// Each element is read before it is written, so an output may be one of the inputs.
#pragma once
#include "each.h"

namespace sdxl {
namespace ARCH {
namespace {

struct Silu {
  static vf f(vf x) { return x * sigmoid(x); }
  static vf df(vf x) {
    const vf s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
  }
};
struct Gelu {
  static vf f(vf x) { return gelu(x); }
  static vf df(vf x) { return gelu_cdf(x) + x * gelu_density(x); }
};
struct QuickGelu {
  static vf f(vf x) { return x * sigmoid(1.702f * x); }
  static vf df(vf x) {
    const vf s = sigmoid(1.702f * x);
    return s * (1.f + 1.702f * x * (1.f - s));
  }
};

template <class Op, class T> void unary_backward(T *dx, const T *dy, const T *x, int n) {
  each(n, [=](int64_t i, int64_t count) { store(dx + i, load(dy + i, count) * Op::df(load(x + i, count)), count); });
}

template <class T> void geglu_backward(T *dx, const T *dy, const T *x, int rows, int c) {
  parallel_for(rows, rows_per_range(c), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *value = x + 2 * r * c, *gate = value + c, *grad = dy + r * c;
      T *dvalue = dx + 2 * r * c, *dgate = dvalue + c;
      vectors(0, c, [=](int64_t i, int64_t count) {
        const vf g = load(grad + i, count), h = load(value + i, count), b = load(gate + i, count), phi = gelu_cdf(b);
        store(dvalue + i, g * (b * phi), count);
        store(dgate + i, g * h * (phi + b * gelu_density(b)), count);
      });
    }
  });
}

} // namespace
} // namespace ARCH
} // namespace sdxl
