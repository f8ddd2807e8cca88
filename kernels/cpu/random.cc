// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
// Elements 4j .. 4j+3 come from counter (j + offset as 64 bits, stream, 0) under the key (seed_low, seed_high), so any part
// of a stream can be drawn by itself. The normals go through double logarithms and sines and are rounded once: every
// instruction set gives the same bits.
#include "philox.h"
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

// As many bits as the type holds, so that rounding never reaches 1.
template <class T> constexpr int uniform_bits();
template <> constexpr int uniform_bits<float>() { return 24; }
template <> constexpr int uniform_bits<bf16>() { return 8; }
template <> constexpr int uniform_bits<f16>() { return 11; }

template <class T> void uniforms(float *out, const Four &random) {
  constexpr int bits = uniform_bits<T>();
  for (int i = 0; i < 4; i++) out[i] = float(random.at[i] >> (32 - bits)) * (1.f / float(1 << bits));
}

// Box-Muller on the pairs (0, 1) and (2, 3); the first uniform lies in (0, 1], so its logarithm is finite.
void normals(float *out, const Four &random) {
  for (int i = 0; i < 4; i += 2) {
    const double radius = __builtin_sqrt(-2.0 * __builtin_log((double(random.at[i]) + 1.0) * 0x1p-32));
    const double angle = 6.283185307179586 * 0x1p-32 * double(random.at[i + 1]);
    out[i] = float(radius * __builtin_cos(angle));
    out[i + 1] = float(radius * __builtin_sin(angle));
  }
}

template <class T>
void draw(T *y, int n, int seed_low, int seed_high, int stream, int offset, void (*transform)(float *, const Four &)) {
  const int64_t groups = (int64_t(n) + 3) / 4;
  parallel_for(groups, GRAIN / 16, [=](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; j++) {
      const uint64_t place = uint64_t(j) + uint32_t(offset);
      const Four counter = {{uint32_t(place), uint32_t(place >> 32), uint32_t(stream), 0}};
      float values[4];
      transform(values, philox(counter, uint32_t(seed_low), uint32_t(seed_high)));
      for (int64_t i = 4 * j; i < 4 * j + 4 && i < n; i++) y[i] = from_float<T>(values[i - 4 * j]);
    }
  });
}

template <class T> void normal_forward(T *y, int n, int seed_low, int seed_high, int stream, int offset) {
  draw(y, n, seed_low, seed_high, stream, offset, normals);
}
template <class T> void uniform_forward(T *y, int n, int seed_low, int seed_high, int stream, int offset) {
  draw(y, n, seed_low, seed_high, stream, offset, uniforms<T>);
}

EXPORT_FLOATS(normal_forward, normal_forward)
EXPORT_FLOATS(uniform_forward, uniform_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
