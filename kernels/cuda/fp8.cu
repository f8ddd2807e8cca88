// 8-bit floats, e4m3 (Micikevicius et al. 2022): four bits of exponent with bias 7, three of mantissa, up to 448, no infinities;
// 0x7f and 0xff are NaN. A tensor's scale, its numbers as bytes, and back again for GPUs that multiply no bytes. Bits are
// moved by hand, the same way on every device (kernels/cpu/fp8.h), and compute_80 has no conversion.
#include "common.cuh"

constexpr float LARGEST = 448;
constexpr int SCALE_CHUNK = 8192;

// The nearest byte, ties to even; what is larger than 448 becomes 448.
DEVICE uint32_t to_e4m3(float x) {
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80u;
  uint32_t bits = __float_as_uint(x) & 0x7fffffffu;
  if (bits > 0x7f800000u) return 0x7fu;
  if (bits >= __float_as_uint(LARGEST)) return sign | 0x7eu;
  // Below 2^-6 in steps of 2^-9: adding 2^14 leaves them in the last bits.
  if (bits < __float_as_uint(0.015625f)) return sign | (__float_as_uint(__uint_as_float(bits) + 16384.f) & 0xfu);
  bits += 0x7ffffu + (bits >> 20 & 1u);
  return sign | ((bits >> 20) - (120u << 3));
}

// As a float of the same exponent field, 120 too small: 2^120 brings subnormals out right as well.
DEVICE float from_e4m3(uint32_t code) {
  if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fffffffu);
  return __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
}

// ---- scale[0] = max |x| / 448, or 1 where x is all zeros

KERNEL(fp8_scale_partial)(float *partial, const T *x, int n) {
  __shared__ float scratch[THREADS / 32];
  const uint32_t chunks = (uint32_t(n) + SCALE_CHUNK - 1) / SCALE_CHUNK;
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t start = chunk * SCALE_CHUNK, end = min(start + SCALE_CHUNK, uint32_t(n));
    float most = 0;
#pragma unroll 1
    for (uint32_t i = start + threadIdx.x * PACK; i < end; i += THREADS * PACK) {
      const Pack p = load(x + i, int(end - i));
#pragma unroll
      for (int j = 0; j < PACK; j++) most = fmaxf(most, fabsf(p.at[j]));
    }
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int warp = 1; warp < THREADS / 32; warp++) most = fmaxf(most, scratch[warp]);
      partial[chunk] = most;
    }
    __syncthreads();
  }
}

// One warp.
KERNEL(fp8_scale_finish)(float *scale, const float *partial, int chunks) {
  if (threadIdx.x >= 32) return;
  float most = 0;
  for (int i = threadIdx.x; i < chunks; i += 32) most = fmaxf(most, partial[i]);
  most = warp_max(most);
  if (threadIdx.x == 0) scale[0] = most > 0 ? most / LARGEST : 1.f;
}

// ---- bytes and numbers

KERNEL(to_fp8_forward)(uint8_t *y, const T *x, const float *scale, int n) {
  const float inverse = 1.f / scale[0];
  each_pack(n, [=](uint32_t i, int count) {
    const Pack p = load(x + i, count);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < PACK; j++) word |= to_e4m3(p.at[j] * inverse) << 8 * j;
    if (count >= PACK) *reinterpret_cast<uint32_t *>(y + i) = word;
    else
      for (int j = 0; j < count; j++) y[i + j] = uint8_t(word >> 8 * j);
  });
}

KERNEL(from_fp8)(T *y, const uint8_t *x, const float *scale, int n) {
  const float factor = scale[0];
  each_pack(n, [=](uint32_t i, int count) {
    uint32_t word = 0;
    if (count >= PACK) word = *reinterpret_cast<const uint32_t *>(x + i);
    else
      for (int j = 0; j < count; j++) word |= uint32_t(x[i + j]) << 8 * j;
    Pack p;
#pragma unroll
    for (int j = 0; j < PACK; j++) p.at[j] = from_e4m3(word >> 8 * j & 0xffu) * factor;
    store(y + i, p, count);
  });
}
