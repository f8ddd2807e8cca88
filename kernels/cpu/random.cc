// The normals of PyTorch's CPU generator from its words of 24 bits: Box-Muller in float32 with Cephes' log, sin and cos, every step
// rounded as engine/cephes_float.ts rounds it, on every instruction set. Places j and j + 8 of a block of 16 hold one pair.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

template <class... C> inline float polynomial(float sum, float t, float next, C... rest) {
  sum = fma(sum, t, next);
  if constexpr (sizeof...(rest) > 0) return polynomial(sum, t, rest...);
  return sum;
}

// Of a positive normal number.
inline float cephes_log(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  int exponent = int(bits >> 23) - 126;
  bits = (bits & 0x007fffffu) | 0x3f000000u;
  float mantissa; // in [0.5, 1)
  memcpy(&mantissa, &bits, 4);
  const bool small = mantissa < 0.707106781f;
  const float k = float(small ? exponent - 1 : exponent), x = mantissa - 1.f + (small ? mantissa : 0.f), z = x * x;
  float y = polynomial(7.0376836292e-2f, x, -1.151461031e-1f, 1.167699874e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  y = fma(y * x, z, k * -2.1219444e-4f);
  y = fma(-z, 0.5f, y);
  return fma(k, 0.693359375f, x + y);
}

// Of theta >= 0.
inline void cephes_sincos(float theta, float &sine, float &cosine) {
  const int octant = (int(theta * 1.27323954f) + 1) & ~1;
  const float k = float(octant);
  float x = fma(k, -0.78515625f, theta); // pi / 4 in three parts
  x = fma(k, -2.4187564849853516e-4f, x);
  x = fma(k, -3.774894977445941e-8f, x);
  const float z = x * x;
  const float even = polynomial(2.443315711809948e-5f, z, -1.388731625493765e-3f, 4.166664568298827e-2f) * z;
  const float cos = fma(even, z, -0.5f * z) + 1.f;
  const float odd = polynomial(-1.9515295891e-4f, z, 8.3321608736e-3f, -1.6666654611e-1f) * z;
  const float sin = fma(odd, x, x);
  const bool swap = octant & 2;
  sine = swap ? cos : sin;
  cosine = swap ? sin : cos;
  if (octant & 4) sine = -sine;
  if (!((octant - 2) & 4)) cosine = -cosine;
}

void torch_normal_forward(float *y, const int *words, int n) {
  parallel_for(n / 16, GRAIN / 16, [=](int64_t begin, int64_t end) {
    for (int64_t i = 16 * begin; i < 16 * end; i += 16)
      for (int64_t j = i; j < i + 8; j++) {
        const float u = float(words[j]) * 0x1p-24f, v = float(words[j + 8]) * 0x1p-24f;
        const float radius = __builtin_sqrtf(-2.f * cephes_log(1.f - u));
        float sine, cosine;
        cephes_sincos(6.28318531f * v, sine, cosine);
        y[j] = radius * cosine;
        y[j + 8] = radius * sine;
      }
  });
}

EXPORT(torch_normal_forward_float32, torch_normal_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
