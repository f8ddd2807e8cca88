// Weights in 8-bit integers: blocks of 32 numbers with a scale each, as bytes that are their rounded quotients plus 128.
#include "common.cuh"

constexpr int BLOCK = 32;

// y[block] = max |x| / 127; NaN where one is, of which the bytes tell nothing. A thread takes a block; a model is rounded once, when it is loaded.
KERNEL(q8_scale_forward)(T *y, const T *x, int n) {
  for (uint32_t block = blockIdx.x * blockDim.x + threadIdx.x; block < uint32_t(n) / BLOCK; block += gridDim.x * blockDim.x) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < BLOCK; i += PACK) {
      const Pack p = load(x + block * BLOCK + i, PACK, true);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float value = fabsf(p.at[j]);
        most = value > most || value != value ? value : most;
      }
    }
    y[block] = from_float<T>(most / 127.f);
  }
}

KERNEL(to_q8_forward)(uint8_t *y, const T *x, const T *scale, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    const Pack p = load(x + i, count, true);
    const float own = to_float(scale[i / BLOCK]), inverse = own > 0 ? 1.f / own : 0.f;
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PACK; j++)
      word |= uint32_t(int(fminf(fmaxf(rintf(p.at[j] * inverse), -127.f), 127.f)) + 128) << 8 * j;
    *reinterpret_cast<uint32_t *>(y + i) = word;
  });
}

KERNEL(from_q8_forward)(T *y, const uint8_t *x, const T *scale, int n) {
  each_pack(n, [=](uint32_t i, int count) {
    const uint32_t word = *reinterpret_cast<const uint32_t *>(x + i);
    const float own = to_float(scale[i / BLOCK]);
    Pack p;
#pragma unroll
    for (int j = 0; j < PACK; j++) p.at[j] = (float(word >> 8 * j & 0xffu) - 128.f) * own;
    store(y + i, p, count, true);
  });
}
