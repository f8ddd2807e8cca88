// Counter-based random numbers. Elements 4j .. 4j+3 come from counter (j + offset as 64 bits, stream, 0) under the key
// (seed_low, seed_high), so any part of a stream can be drawn by itself. The normals go through double logarithms and
// sines and are rounded once, which gives the CPU kernels' bits wherever the two libraries' doubles do not straddle a
// rounding boundary (about one in 2^28).
#include "philox.cuh"

template <class F> DEVICE void draw(T *y, int n, int seed_low, int seed_high, int stream, int offset, F &&transform) {
  each_pack(n, [=](uint32_t i, int count) {
    const uint64_t place = uint64_t(i / PACK) + uint32_t(offset);
    const uint4 counter = make_uint4(uint32_t(place), uint32_t(place >> 32), uint32_t(stream), 0);
    store(y + i, transform(philox(counter, uint32_t(seed_low), uint32_t(seed_high))), count);
  });
}

// Box-Muller on a pair; the first uniform lies in (0, 1], so its logarithm is finite.
DEVICE void normal_pair(float *out, uint32_t first, uint32_t second) {
  const double radius = sqrt(-2.0 * log((double(first) + 1.0) * 0x1p-32));
  double sine, cosine;
  sincospi(double(second) * 0x1p-31, &sine, &cosine);
  out[0] = float(radius * cosine);
  out[1] = float(radius * sine);
}

KERNEL(normal_forward)(T *y, int n, int seed_low, int seed_high, int stream, int offset) {
  draw(y, n, seed_low, seed_high, stream, offset, [](uint4 random) {
    Pack out;
    normal_pair(out.at, random.x, random.y);
    normal_pair(out.at + 2, random.z, random.w);
    return out;
  });
}

// As many bits as the type holds, so that rounding never reaches 1.
KERNEL(uniform_forward)(T *y, int n, int seed_low, int seed_high, int stream, int offset) {
  constexpr int bits = sizeof(T) == 4 ? 24 : __is_same(T, bf16) ? 8 : 11;
  draw(y, n, seed_low, seed_high, stream, offset, [](uint4 random) {
    const float unit = 1.f / float(1 << bits);
    return Pack{{float(random.x >> (32 - bits)) * unit, float(random.y >> (32 - bits)) * unit,
                 float(random.z >> (32 - bits)) * unit, float(random.w >> (32 - bits)) * unit}};
  });
}
