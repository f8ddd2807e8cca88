// Elementwise kernels: y[i] = f(x[i]) and dx[i] = dy[i] f'(x[i]), binary arithmetic, scaling, GEGLU, fill and cast.
// Each element is read before it is written, so an output may be one of the inputs.
#include "common.cuh"

// tanh' and sigmoid' from e^-|x|, because 1 - tanh^2 and s (1 - s) cancel for large x.
DEVICE float bell(float x) {
  const float e = expf(-fabsf(x)), d = 1.f + e;
  return e / (d * d);
}

#define UNARY(name, f, df) \
  KERNEL(name##_forward)(T *y, const T *x, int n) { \
    each_pack(n, [=](uint32_t i, int count) { \
      Pack p = load(x + i, count); \
      _Pragma("unroll") for (int j = 0; j < PACK; j++) { \
        const float v = p.at[j]; \
        p.at[j] = f; \
      } \
      store(y + i, p, count); \
    }); \
  } \
  KERNEL(name##_backward)(T *dx, const T *dy, const T *x, int n) { \
    each_pack(n, [=](uint32_t i, int count) { \
      const Pack p = load(x + i, count); \
      Pack g = load(dy + i, count); \
      _Pragma("unroll") for (int j = 0; j < PACK; j++) { \
        const float v = p.at[j]; \
        g.at[j] *= df; \
      } \
      store(dx + i, g, count); \
    }); \
  }

DEVICE float silu_slope(float x, float rate) {
  const float s = sigmoid(rate * x);
  return s * (1.f + rate * x * (1.f - s));
}

UNARY(silu, silu(v), silu_slope(v, 1.f))
UNARY(gelu, gelu(v), (gelu_cdf(v) + v * gelu_density(v)))
UNARY(quick_gelu, quick_gelu(v), silu_slope(v, 1.702f))
UNARY(relu, (v < 0.f ? 0.f : v), (v > 0.f ? 1.f : 0.f))
UNARY(leaky_relu, (v < 0.f ? 0.2f * v : v), (v > 0.f ? 1.f : 0.2f)) // ESRGAN's slope
UNARY(exp, expf(v), expf(v))
UNARY(square, (v * v), (2.f * v))
UNARY(tanh, tanhf(v), (4.f * bell(2.f * v)))
UNARY(sigmoid, sigmoid(v), bell(v))

#define BINARY(name, operation) \
  KERNEL(name##_forward)(T *y, const T *a, const T *b, int n) { \
    each_pack(n, [=](uint32_t i, int count) { \
      Pack p = load(a + i, count); \
      const Pack q = load(b + i, count); \
      _Pragma("unroll") for (int j = 0; j < PACK; j++) p.at[j] = p.at[j] operation q.at[j]; \
      store(y + i, p, count); \
    }); \
  }

BINARY(add, +)
BINARY(sub, -)
BINARY(mul, *)
BINARY(div, /)

KERNEL(mul_backward)(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    const Pack g = load(dy + i, count), x = load(a + i, count), y = load(b + i, count);
    Pack out;
    if (da) {
#pragma unroll
      for (int j = 0; j < PACK; j++) out.at[j] = g.at[j] * y.at[j];
      store(da + i, out, count);
    }
    if (db) {
#pragma unroll
      for (int j = 0; j < PACK; j++) out.at[j] = g.at[j] * x.at[j];
      store(db + i, out, count);
    }
  });
}

KERNEL(div_backward)(T *da, T *db, const T *dy, const T *a, const T *b, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    Pack g = load(dy + i, count);
    const Pack x = load(a + i, count), y = load(b + i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) g.at[j] /= y.at[j];
    if (da) store(da + i, g, count);
    if (db) {
#pragma unroll
      for (int j = 0; j < PACK; j++) g.at[j] *= -(x.at[j] / y.at[j]);
      store(db + i, g, count);
    }
  });
}

KERNEL(scale_forward)(T *y, const T *x, int n, float a, float b) {
  each_pack(n, [=](uint32_t i, int count) {
    Pack p = load(x + i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) p.at[j] = p.at[j] * a + b;
    store(y + i, p, count);
  });
}

KERNEL(fill_forward)(T *y, int n, float value) {
  each_pack(n, [=](uint32_t i, int count) { store(y + i, Pack{{value, value, value, value}}, count); });
}

// 255 (x / 2 + 0.5) as a byte, rounded half to even; NaN is 0.
KERNEL(to_pixels_forward)(uint8_t *y, const T *x, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    const Pack p = load(x + i, count);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float value = __fadd_rn(0.5f * p.at[j], 0.5f);
      word |= uint32_t(__float2int_rn(__fmul_rn(255.f, value > 0.f ? fminf(value, 1.f) : 0.f))) << 8 * j;
    }
    if (count >= PACK) *reinterpret_cast<uint32_t *>(y + i) = word;
    else
      for (int j = 0; j < count; j++) y[i + j] = uint8_t(word >> 8 * j);
  });
}

DEVICE void add_weighted(double (&sum)[PACK], const Pack &x, double weight) {
#pragma unroll
  for (int j = 0; j < PACK; j++) sum[j] = fma(weight, double(x.at[j]), sum[j]);
}

// y = wa a + wb b + ..., summed in double and rounded once. Absent terms are null, and come last.
KERNEL(combine_forward)(T *y, const T *a, const T *b, const T *c, const T *d, const T *e, const T *f, double wa, double wb,
                        double wc, double wd, double we, double wf, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    double sum[PACK] = {};
    add_weighted(sum, load(a + i, count), wa);
    if (b) add_weighted(sum, load(b + i, count), wb);
    if (c) add_weighted(sum, load(c + i, count), wc);
    if (d) add_weighted(sum, load(d + i, count), wd);
    if (e) add_weighted(sum, load(e + i, count), we);
    if (f) add_weighted(sum, load(f + i, count), wf);
    Pack p;
#pragma unroll
    for (int j = 0; j < PACK; j++) p.at[j] = float(sum[j]);
    store(y + i, p, count);
  });
}

// x is [rows][2][c]: c values, then their c gates. A block walks rows, its threads a row's packs.
KERNEL(geglu_forward)(T *y, const T *x, int rows, int c) {
  const bool aligned = c % PACK == 0;
  for (int r = blockIdx.x; r < rows; r += gridDim.x) {
    const T *value = x + int64_t(2) * r * c, *gate = value + c;
    for (int i = threadIdx.x * PACK; i < c; i += blockDim.x * PACK) {
      Pack h = load(value + i, c - i, aligned);
      const Pack b = load(gate + i, c - i, aligned);
#pragma unroll
      for (int j = 0; j < PACK; j++) h.at[j] *= gelu(b.at[j]);
      store(y + int64_t(r) * c + i, h, c - i, aligned);
    }
  }
}

KERNEL(geglu_backward)(T *dx, const T *dy, const T *x, int rows, int c) {
  const bool aligned = c % PACK == 0;
  for (int r = blockIdx.x; r < rows; r += gridDim.x) {
    const T *value = x + int64_t(2) * r * c, *gate = value + c;
    T *dvalue = dx + int64_t(2) * r * c, *dgate = dvalue + c;
    for (int i = threadIdx.x * PACK; i < c; i += blockDim.x * PACK) {
      const Pack g = load(dy + int64_t(r) * c + i, c - i, aligned);
      Pack h = load(value + i, c - i, aligned), b = load(gate + i, c - i, aligned);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float z = b.at[j], phi = gelu_cdf(z);
        b.at[j] = g.at[j] * h.at[j] * (phi + z * gelu_density(z));
        h.at[j] = g.at[j] * (z * phi);
      }
      store(dvalue + i, h, c - i, aligned);
      store(dgate + i, b, c - i, aligned);
    }
  }
}

template <class To> DEVICE void cast(To *y, const T *x, int n) {
  each_pack(n, [=](uint32_t i, int count) { store(y + i, load(x + i, count), count); });
}
KERNEL(cast_to_float32_forward)(float *y, const T *x, int n) { cast(y, x, n); }
KERNEL(cast_to_bfloat16_forward)(bf16 *y, const T *x, int n) { cast(y, x, n); }
KERNEL(cast_to_float16_forward)(f16 *y, const T *x, int n) { cast(y, x, n); }
