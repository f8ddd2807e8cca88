// Elementwise kernels: y[i] = f(x[i]) and dx[i] = dy[i] f'(x[i]), binary arithmetic, scaling, GEGLU, fill and cast.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class F> void each(int n, F &&body) {
  parallel_for(n, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) body(i);
  });
}

struct Silu {
  static float f(float x) { return x * sigmoid(x); }
  static float df(float x) {
    const float s = sigmoid(x);
    return s * (1.f + x * (1.f - s));
  }
};
struct Gelu {
  static float f(float x) { return x * gelu_cdf(x); }
  static float df(float x) { return gelu_cdf(x) + x * gelu_density(x); }
};
struct QuickGelu {
  static float f(float x) { return x * sigmoid(1.702f * x); }
  static float df(float x) {
    const float s = sigmoid(1.702f * x);
    return s * (1.f + 1.702f * x * (1.f - s));
  }
};
struct Exp {
  static float f(float x) { return fast_exp(x); }
  static float df(float x) { return fast_exp(x); }
};
struct Square {
  static float f(float x) { return x * x; }
  static float df(float x) { return 2.f * x; }
};
struct Tanh {
  static float f(float x) { return tanhf(x); }
  static float df(float x) {
    const float y = tanhf(x);
    return 1.f - y * y;
  }
};
struct Sigmoid {
  static float f(float x) { return sigmoid(x); }
  static float df(float x) {
    const float s = sigmoid(x);
    return s * (1.f - s);
  }
};

template <class Op, class T> void unary(T *y, const T *x, int n) {
  each(n, [&](int64_t i) { y[i] = from_float<T>(Op::f(to_float(x[i]))); });
}

template <class Op, class T> void unary_backward(T *dx, const T *dy, const T *x, int n) {
  each(n, [&](int64_t i) { dx[i] = from_float<T>(to_float(dy[i]) * Op::df(to_float(x[i]))); });
}

#define UNARY(name, Op) \
  template <class T> void name##_forward(T *y, const T *x, int n) { unary<Op>(y, x, n); } \
  template <class T> void name##_backward(T *dx, const T *dy, const T *x, int n) { unary_backward<Op>(dx, dy, x, n); }

UNARY(silu, Silu)
UNARY(gelu, Gelu)
UNARY(quick_gelu, QuickGelu)
UNARY(exp, Exp)
UNARY(square, Square)
UNARY(tanh, Tanh)
UNARY(sigmoid, Sigmoid)

#define BINARY(name, expression) \
  template <class T> void name##_forward(T *y, const T *a_, const T *b_, int n) { \
    each(n, [&](int64_t i) { \
      const float a = to_float(a_[i]), b = to_float(b_[i]); \
      y[i] = from_float<T>(expression); \
    }); \
  }

BINARY(add, a + b)
BINARY(sub, a - b)
BINARY(mul, a * b)
BINARY(div, a / b)

template <class T> void mul_backward(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each(n, [&](int64_t i) {
    const float g = to_float(dy[i]);
    if (da) da[i] = from_float<T>(g * to_float(b[i]));
    if (db) db[i] = from_float<T>(g * to_float(a[i]));
  });
}

template <class T> void div_backward(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each(n, [&](int64_t i) {
    const float g = to_float(dy[i]) / to_float(b[i]);
    if (da) da[i] = from_float<T>(g);
    if (db) db[i] = from_float<T>(-g * to_float(a[i]) / to_float(b[i]));
  });
}

template <class T> void scale_forward(T *y, const T *x, int n, float a, float b) {
  each(n, [&](int64_t i) { y[i] = from_float<T>(a * to_float(x[i]) + b); });
}

template <class T> void fill_forward(T *y, int n, float value) {
  each(n, [&](int64_t i) { y[i] = from_float<T>(value); });
}

template <class T> void geglu_forward(T *y, const T *x, int rows, int c) {
  parallel_for(rows, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int i = 0; i < c; i++)
        y[r * c + i] = from_float<T>(to_float(x[2 * r * c + i]) * Gelu::f(to_float(x[(2 * r + 1) * c + i])));
  });
}

template <class T> void geglu_backward(T *dx, const T *dy, const T *x, int rows, int c) {
  parallel_for(rows, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int i = 0; i < c; i++) {
        const float g = to_float(dy[r * c + i]);
        const float a = to_float(x[2 * r * c + i]), b = to_float(x[(2 * r + 1) * c + i]);
        dx[2 * r * c + i] = from_float<T>(g * Gelu::f(b));
        dx[(2 * r + 1) * c + i] = from_float<T>(g * a * Gelu::df(b));
      }
  });
}

template <class To, class From> void cast(To *y, const From *x, int n) {
  each(n, [&](int64_t i) { y[i] = from_float<To>(to_float(x[i])); });
}
template <class From> void cast_to_float32(float *y, const From *x, int n) { cast(y, x, n); }
template <class From> void cast_to_bfloat16(bf16 *y, const From *x, int n) { cast(y, x, n); }
template <class From> void cast_to_float16(f16 *y, const From *x, int n) { cast(y, x, n); }

#define EXPORT_BOTH(name) EXPORT_FLOATS(name##_forward, name##_forward) EXPORT_FLOATS(name##_backward, name##_backward)
EXPORT_BOTH(silu)
EXPORT_BOTH(gelu)
EXPORT_BOTH(quick_gelu)
EXPORT_BOTH(exp)
EXPORT_BOTH(square)
EXPORT_BOTH(tanh)
EXPORT_BOTH(sigmoid)
EXPORT_BOTH(mul)
EXPORT_BOTH(div)
EXPORT_BOTH(geglu)
EXPORT_FLOATS(add_forward, add_forward)
EXPORT_FLOATS(sub_forward, sub_forward)
EXPORT_FLOATS(scale_forward, scale_forward)
EXPORT_FLOATS(fill_forward, fill_forward)
EXPORT_FLOATS(cast_to_float32_forward, cast_to_float32)
EXPORT_FLOATS(cast_to_bfloat16_forward, cast_to_bfloat16)
EXPORT_FLOATS(cast_to_float16_forward, cast_to_float16)

} // namespace
} // namespace ARCH
} // namespace sdxl
