// The normals of PyTorch's CPU generator from its words of 24 bits: Box-Muller in float32 with Cephes' log, sin and cos, every step
// rounded as engine/cephes_float.ts rounds it, so that a seed means the same picture on each device. A thread makes a pair, whose places
// in a block of 16 are j and j + 8.
#include "common.cuh"

template <class... C> DEVICE float polynomial(float sum, float t, float next, C... rest) {
  sum = __fmaf_rn(sum, t, next);
  if constexpr (sizeof...(rest) > 0) return polynomial(sum, t, rest...);
  return sum;
}

// Of a positive normal number.
DEVICE float cephes_log(float value) {
  const uint32_t bits = __float_as_uint(value);
  float exponent = float(int(bits >> 23) - 126);
  const float mantissa = __uint_as_float((bits & 0x007fffffu) | 0x3f000000u); // in [0.5, 1)
  float x = __fadd_rn(mantissa, -1.f);
  if (mantissa < 0.707106781f) {
    exponent -= 1.f;
    x = __fadd_rn(x, mantissa);
  }
  const float z = __fmul_rn(x, x);
  float y = polynomial(7.0376836292e-2f, x, -1.151461031e-1f, 1.167699874e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  y = __fmaf_rn(__fmul_rn(y, x), z, __fmul_rn(exponent, -2.1219444e-4f));
  y = __fmaf_rn(-z, 0.5f, y);
  return __fmaf_rn(exponent, 0.693359375f, __fadd_rn(x, y));
}

// Of theta >= 0.
DEVICE void cephes_sincos(float theta, float &sine, float &cosine) {
  const int octant = (int(__fmul_rn(theta, 1.27323954f)) + 1) & ~1;
  const float k = float(octant);
  float x = __fmaf_rn(k, -0.78515625f, theta); // pi / 4 in three parts
  x = __fmaf_rn(k, -2.4187564849853516e-4f, x);
  x = __fmaf_rn(k, -3.774894977445941e-8f, x);
  const float z = __fmul_rn(x, x);
  const float even = __fmul_rn(polynomial(2.443315711809948e-5f, z, -1.388731625493765e-3f, 4.166664568298827e-2f), z);
  const float cos = __fadd_rn(__fmaf_rn(even, z, -0.5f * z), 1.f);
  const float odd = __fmul_rn(polynomial(-1.9515295891e-4f, z, 8.3321608736e-3f, -1.6666654611e-1f), z);
  const float sin = __fmaf_rn(odd, x, x);
  const bool swap = octant & 2;
  sine = swap ? cos : sin;
  cosine = swap ? sin : cos;
  if (octant & 4) sine = -sine;
  if (!((octant - 2) & 4)) cosine = -cosine;
}

KERNEL(torch_normal_forward)(T *y, const int *words, int n) {
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n / 2; i += gridDim.x * blockDim.x) {
    const int at = 2 * i - (i & 7);
    const float u = float(words[at]) * 0x1p-24f, v = float(words[at + 8]) * 0x1p-24f;
    const float radius = __fsqrt_rn(-2.f * cephes_log(__fadd_rn(1.f, -u)));
    float sine, cosine;
    cephes_sincos(__fmul_rn(6.28318531f, v), sine, cosine);
    y[at] = __fmul_rn(radius, cosine);
    y[at + 8] = __fmul_rn(radius, sine);
  }
}
