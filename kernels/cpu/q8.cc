// Weights in 8-bit integers: blocks of 32 numbers with a scale each, as bytes that are their rounded quotients plus 128.
#include "each.h"

namespace sdxl {
namespace ARCH {
namespace {

constexpr int BLOCK = 32;
constexpr int64_t BLOCKS_AT_ONCE = GRAIN / BLOCK;

typedef uint8_t vb __attribute__((vector_size(LANES)));

// y[block] = max |x| / 127; NaN where one is, of which the bytes tell nothing.
template <class T> void q8_scale_forward(T *y, const T *x, int n) {
  parallel_for(n / BLOCK, BLOCKS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      float largest = 0;
      for (int i = 0; i < BLOCK; i++) {
        const float value = __builtin_fabsf(to_float(x[block * BLOCK + i]));
        largest = value > largest || value != value ? value : largest;
      }
      y[block] = from_float<T>(largest / 127);
    }
  });
}

template <class T> void to_q8_forward(uint8_t *y, const T *x, const T *scale, int n) {
  parallel_for(n / BLOCK, BLOCKS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const float own = to_float(scale[block]), inverse = own > 0 ? 1 / own : 0;
      for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i++) {
        const float number = __builtin_rintf(to_float(x[i]) * inverse);
        y[i] = uint8_t(int(number > -127 ? (number < 127 ? number : 127) : -127) + 128);
      }
    }
  });
}

template <class T> void from_q8_forward(T *y, const uint8_t *x, const T *scale, int n) {
  parallel_for(n / BLOCK, BLOCKS_AT_ONCE, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const float own = to_float(scale[block]);
      for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += LANES) {
        vb bytes;
        memcpy(&bytes, x + i, sizeof bytes);
        store(y + i, (__builtin_convertvector(__builtin_convertvector(bytes, vi), vf) - 128) * own);
      }
    }
  });
}

EXPORT_FLOATS(q8_scale_forward, q8_scale_forward)
EXPORT_FLOATS(to_q8_forward, to_q8_forward)
EXPORT_FLOATS(from_q8_forward, from_q8_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
