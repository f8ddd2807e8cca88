// A tensor's scale for 8-bit floats, and its numbers as bytes of e4m3.
#include "fp8.h"

#include "each.h"

namespace sdxl {
namespace ARCH {
namespace {

// scale[0] = max |x| / 448, or 1 where x is all zeros.
template <class T> void fp8_scale_forward(float *scale, const T *x, int n) {
  const int64_t chunks = (int64_t(n) + GRAIN - 1) / GRAIN;
  Floats most(chunks);
  parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t start = chunk * GRAIN, stop = n - start < GRAIN ? n : start + GRAIN;
      float largest = 0;
      for (int64_t i = start; i < stop; i++) {
        const float value = __builtin_fabsf(to_float(x[i]));
        largest = value > largest ? value : largest;
      }
      most.data[chunk] = largest;
    }
  });
  float largest = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) largest = most.data[chunk] > largest ? most.data[chunk] : largest;
  scale[0] = largest > 0 ? largest / LARGEST : 1;
}

template <class T> void to_fp8_forward(uint8_t *y, const T *x, const float *scale, int n) {
  const float inverse = 1 / scale[0];
  parallel_for(n, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) y[i] = to_e4m3(to_float(x[i]) * inverse);
  });
}

EXPORT_FLOATS(fp8_scale_forward, fp8_scale_forward)
EXPORT_FLOATS(to_fp8_forward, to_fp8_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
