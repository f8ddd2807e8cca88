// One step of AdamW with moments of one byte (Dettmers et al. 2022): each block of 256 elements has its own largest magnitude,
// and a byte names one of 256 values in [-1, 1] (first moment) or [0, 1] (second), dense near zero. The step itself is taken
// with the new moments before they are rounded.
#include "optimizer.h"

#include <algorithm>

namespace sdxl {
namespace ARCH {
namespace {

constexpr int BLOCK = 256;

// The dynamic map: for each power of ten 10^(i - 6), the centres of 2^i (unsigned: 2^(i + 1)) equal parts of [0.1, 1], with
// both signs where signed; then 0 and 1. Sorted, with the midpoints between neighbours.
struct DynamicMap {
  float value[256], midpoint[256];

  explicit DynamicMap(bool is_signed) {
    int count = 0;
    for (int i = 0; i < 7; i++) {
      const int parts = 1 << (is_signed ? i : i + 1);
      double scale = 1;
      for (int k = i; k < 6; k++) scale /= 10;
      for (int k = 0; k < parts; k++) {
        const float centre = float(scale * (0.1 + 0.9 * (k + 0.5) / parts));
        value[count++] = centre;
        if (is_signed) value[count++] = -centre;
      }
    }
    value[count++] = 0;
    value[count++] = 1;
    std::sort(value, value + 256);
    for (int k = 0; k < 255; k++) midpoint[k] = 0.5f * (value[k] + value[k + 1]);
    midpoint[255] = 2;
  }

  // The nearest value's number: how many midpoints lie below x.
  int nearest(float x) const {
    int at = 0;
    for (int half = 128; half > 0; half /= 2)
      if (midpoint[at + half - 1] < x) at += half;
    return at;
  }
};

const DynamicMap &first_map() {
  static const DynamicMap map(true);
  return map;
}
const DynamicMap &second_map() {
  static const DynamicMap map(false);
  return map;
}

inline float largest(const float *x, int64_t count) {
  float most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, x[i] < 0 ? -x[i] : x[i]);
  return most;
}

// A moment that is not zero keeps its sign: its byte is never that of 0 or of the other side.
inline int signed_code(const DynamicMap &map, float x) {
  const int code = map.nearest(x);
  if (x > 0 && map.value[code] <= 0) return code + 1;
  if (x < 0 && map.value[code] >= 0) return code - 1;
  return code;
}

template <class T>
void adamw_8bit_forward(T *weight, float *master, const T *gradient, uint8_t *state1, uint8_t *state2, float *absmax1,
                        float *absmax2, int n, float gradient_scale, float decay, float one_minus_beta1, float beta2,
                        float one_minus_beta2, float step_size, float inverse_correction2, float eps, int stochastic,
                        int seed_low, int seed_high, int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  const DynamicMap &map1 = first_map(), &map2 = second_map();
  const int64_t blocks = (int64_t(n) + BLOCK - 1) / BLOCK;
  parallel_for(blocks, 16, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t start = block * BLOCK, size = n - start < BLOCK ? n - start : BLOCK;
      float m[BLOCK], v[BLOCK];
      for (int64_t i = 0; i < size; i++) {
        m[i] = map1.value[state1[start + i]] * absmax1[block];
        v[i] = map2.value[state2[start + i]] * absmax2[block];
      }
      vectors(0, size, [&](int64_t i, int64_t count) {
        const int64_t at = start + i;
        const vf g = load(gradient + at, count) * gradient_scale, m0 = load(m + i, count);
        const vf first = m0 + one_minus_beta1 * (g - m0);
        const vf second = load(v + i, count) * beta2 + one_minus_beta2 * g * g;
        store(m + i, first, count);
        store(v + i, second, count);
        const vf change = step_size * (first / (sqrt(second) * inverse_correction2 + eps));
        weights.write(at, weights.read(at, count) * decay - change, count);
      });
      absmax1[block] = largest(m, size);
      absmax2[block] = largest(v, size);
      const float inverse1 = absmax1[block] > 0 ? 1.f / absmax1[block] : 0, inverse2 = absmax2[block] > 0 ? 1.f / absmax2[block] : 0;
      for (int64_t i = 0; i < size; i++) {
        state1[start + i] = uint8_t(signed_code(map1, m[i] * inverse1));
        state2[start + i] = uint8_t(map2.nearest(v[i] * inverse2));
      }
    }
  });
}

EXPORT_FLOATS(adamw_8bit_forward, adamw_8bit_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
