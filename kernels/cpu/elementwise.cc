// Elementwise kernels: y[i] = f(x[i]) and dx[i] = dy[i] f'(x[i]), binary arithmetic, scaling, GEGLU, fill and cast.
// Each element is read before it is written, so an output may be one of the inputs.
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
struct Relu {
  static vf f(vf x) { return x < 0.f ? splat(0.f) : x; } // NaN stays NaN
  static vf df(vf x) { return x > 0.f ? splat(1.f) : splat(0.f); }
};
struct LeakyRelu { // as in ESRGAN, whose slope below 0 is 0.2
  static vf f(vf x) { return x < 0.f ? 0.2f * x : x; }
  static vf df(vf x) { return x > 0.f ? splat(1.f) : splat(0.2f); }
};
struct Exp {
  static vf f(vf x) { return fast_exp(x); }
  static vf df(vf x) { return fast_exp(x); }
};
struct Square {
  static vf f(vf x) { return x * x; }
  static vf df(vf x) { return 2.f * x; }
};
// tanh' = 4 s (1 - s) with s = sigmoid(2x) would cancel for large x; e / (1 + e)^2 with e = exp(-2|x|) does not.
struct Tanh {
  static vf f(vf x) { return fast_tanh(x); }
  static vf df(vf x) {
    const vf e = fast_exp(x < 0.f ? 2.f * x : -2.f * x), d = 1.f + e;
    return 4.f * e / (d * d);
  }
};
struct Sigmoid {
  static vf f(vf x) { return sigmoid(x); }
  static vf df(vf x) {
    const vf e = fast_exp(x < 0.f ? x : -x), d = 1.f + e;
    return e / (d * d);
  }
};

template <class Op, class T> void unary(T *y, const T *x, int n) {
  each(n, [=](int64_t i, int64_t count) { store(y + i, Op::f(load(x + i, count)), count); });
}
template <class Op, class T> void unary_backward(T *dx, const T *dy, const T *x, int n) {
  each(n, [=](int64_t i, int64_t count) { store(dx + i, load(dy + i, count) * Op::df(load(x + i, count)), count); });
}

#define UNARY(name, Op) \
  template <class T> void name##_forward(T *y, const T *x, int n) { unary<Op>(y, x, n); } \
  template <class T> void name##_backward(T *dx, const T *dy, const T *x, int n) { unary_backward<Op>(dx, dy, x, n); }

UNARY(silu, Silu)
UNARY(gelu, Gelu)
UNARY(quick_gelu, QuickGelu)
UNARY(relu, Relu)
UNARY(leaky_relu, LeakyRelu)
UNARY(exp, Exp)
UNARY(square, Square)
UNARY(tanh, Tanh)
UNARY(sigmoid, Sigmoid)

#define BINARY(name, operation) \
  template <class T> void name##_forward(T *y, const T *a, const T *b, int n) { \
    each(n, [=](int64_t i, int64_t count) { store(y + i, load(a + i, count) operation load(b + i, count), count); }); \
  }

BINARY(add, +)
BINARY(sub, -)
BINARY(mul, *)
BINARY(div, /)

template <class T> void mul_backward(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each(n, [=](int64_t i, int64_t count) {
    const vf g = load(dy + i, count), x = load(a + i, count), y = load(b + i, count);
    if (da) store(da + i, g * y, count);
    if (db) store(db + i, g * x, count);
  });
}

template <class T> void div_backward(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each(n, [=](int64_t i, int64_t count) {
    const vf x = load(a + i, count), y = load(b + i, count), g = load(dy + i, count) / y;
    if (da) store(da + i, g, count);
    if (db) store(db + i, -g * (x / y), count);
  });
}

template <class T> void scale_forward(T *y, const T *x, int n, float a, float b) {
  each(n, [=](int64_t i, int64_t count) { store(y + i, load(x + i, count) * a + b, count); });
}

template <class T> void fill_forward(T *y, int n, float value) {
  each(n, [=](int64_t i, int64_t count) { store(y + i, splat(value), count); });
}

// 255 (x / 2 + 0.5) as a byte, rounded half to even; NaN is 0.
template <class T> void to_pixels_forward(uint8_t *y, const T *x, int n) {
  parallel_for(n, GRAIN, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const float value = 0.5f * to_float(x[i]) + 0.5f; // fused or not, rounded once
      const float clamped = value > 0.f ? value < 1.f ? value : 1.f : 0.f;
      y[i] = uint8_t(__builtin_rintf(255.f * clamped));
    }
  });
}

// y = wa a + wb b + ..., summed in double and rounded once. Absent terms are null, and come last.
template <class T>
void combine_forward(T *y, const T *a, const T *b, const T *c, const T *d, const T *e, const T *f, double wa, double wb,
                     double wc, double wd, double we, double wf, int n) {
  const T *terms[] = {a, b, c, d, e, f};
  const double weights[] = {wa, wb, wc, wd, we, wf};
  each(n, [=](int64_t i, int64_t count) {
    double sum[LANES] = {};
    for (int k = 0; k < 6 && terms[k]; k++) {
      const vf x = load(terms[k] + i, count);
      for (int lane = 0; lane < LANES; lane++) sum[lane] += weights[k] * double(x[lane]);
    }
    vf rounded;
    for (int lane = 0; lane < LANES; lane++) rounded[lane] = float(sum[lane]);
    store(y + i, rounded, count);
  });
}

template <class T> void geglu_forward(T *y, const T *x, int rows, int c) {
  parallel_for(rows, rows_per_range(c), [=](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *value = x + 2 * r * c, *gate = value + c;
      T *out = y + r * c;
      vectors(0, c, [=](int64_t i, int64_t count) {
        store(out + i, load(value + i, count) * gelu(load(gate + i, count)), count);
      });
    }
  });
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

template <class To, class From> void cast(To *y, const From *x, int n) {
  each(n, [=](int64_t i, int64_t count) { store(y + i, load(x + i, count), count); });
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
EXPORT_BOTH(relu)
EXPORT_BOTH(leaky_relu)
EXPORT_BOTH(mul)
EXPORT_BOTH(div)
EXPORT_BOTH(geglu)
EXPORT_FLOATS(add_forward, add_forward)
EXPORT_FLOATS(sub_forward, sub_forward)
EXPORT_FLOATS(scale_forward, scale_forward)
EXPORT_FLOATS(fill_forward, fill_forward)
EXPORT_FLOATS(combine_forward, combine_forward)
EXPORT_FLOATS(to_pixels_forward, to_pixels_forward)
EXPORT_FLOATS(cast_to_float32_forward, cast_to_float32)
EXPORT_FLOATS(cast_to_bfloat16_forward, cast_to_bfloat16)
EXPORT_FLOATS(cast_to_float16_forward, cast_to_float16)

} // namespace
} // namespace ARCH
} // namespace sdxl
