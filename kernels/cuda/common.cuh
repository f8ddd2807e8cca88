// What every kernel file shares. A file is compiled once per storage type, with T_FLOAT32, T_BFLOAT16 or T_FLOAT16 defined:
// T is the storage type, KERNEL(op_direction) opens the entry `<op>_<direction>_<dtype>`, and all arithmetic is float32.
// A pack is four neighbours: 16 bytes of float, 8 of the half types. Every tensor starts on a 256-byte boundary.
#pragma once
#include <cstdint>

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#if defined(T_BFLOAT16)
typedef bf16 T;
#define DTYPE bfloat16
#elif defined(T_FLOAT16)
typedef f16 T;
#define DTYPE float16
#else
typedef float T;
#define DTYPE float32
#endif

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
// Threads of a block, unless a file says otherwise with KERNEL_OF. Two blocks must fit a multiprocessor: without that word
// ptxas aims at more of them and spills a few registers of the matrix kernels to get there.
constexpr int THREADS = 256;
#define KERNEL_OF(threads, name) extern "C" __global__ void __launch_bounds__(threads, 2) JOIN(name, DTYPE)
#define KERNEL(name) KERNEL_OF(THREADS, name)
#define DEVICE static __device__ __forceinline__

// ---- storage <-> float

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class S> DEVICE S from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ __forceinline__ f16 from_float<f16>(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

constexpr int PACK = 4;

template <int N> struct Floats {
  float at[N];
};
typedef Floats<PACK> Pack;

template <class S, int N = PACK> struct alignas(N * sizeof(S) < 16 ? N * sizeof(S) : 16) Stored {
  S at[N];
};

// N neighbours where `whole`: p then lies on their boundary. Otherwise the first `count` of them, one by one: the rest
// read as 0 and are not written. Rows of whole packs are told apart by their length alone, so no tail is tested for in them.
template <int N = PACK, class S> DEVICE Floats<N> load(const S *p, int count, bool whole) {
  Floats<N> x;
  if (whole) {
    const Stored<S, N> in = *reinterpret_cast<const Stored<S, N> *>(p);
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] = to_float(in.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; i++) x.at[i] = i < count ? to_float(p[i]) : 0.f;
  }
  return x;
}
template <int N = PACK, class S> DEVICE Floats<N> load(const S *p, int count) { return load<N>(p, count, count >= N); }

template <int N, class S> DEVICE void store(S *p, const Floats<N> &x, int count, bool whole) {
  if (whole) {
    Stored<S, N> out;
#pragma unroll
    for (int i = 0; i < N; i++) out.at[i] = from_float<S>(x.at[i]);
    *reinterpret_cast<Stored<S, N> *>(p) = out;
  } else {
#pragma unroll
    for (int i = 0; i < N; i++)
      if (i < count) p[i] = from_float<S>(x.at[i]);
  }
}
template <int N, class S> DEVICE void store(S *p, const Floats<N> &x, int count) { store(p, x, count, count >= N); }

// body(i, count) for every pack of n elements, over the whole grid.
template <class F> DEVICE void each_pack(int n, F &&body) {
  for (uint32_t i = (blockIdx.x * blockDim.x + threadIdx.x) * PACK; i < uint32_t(n); i += gridDim.x * blockDim.x * PACK)
    body(i, n - int(i));
}

// ---- functions, accurate to a few units in the last place

DEVICE float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
DEVICE float silu(float x) { return x / (1.f + expf(-x)); }
// The normal distribution's Phi(x) and its density: gelu(x) = x Phi(x).
DEVICE float gelu_cdf(float x) { return 0.5f * erfcf(-0.70710678f * x); }
DEVICE float gelu_density(float x) { return 0.3989422804f * expf(-0.5f * x * x); }
DEVICE float gelu(float x) { return x * gelu_cdf(x); }
DEVICE float quick_gelu(float x) { return x / (1.f + expf(-1.702f * x)); }

// ---- sums in a fixed order

// The same tree on every run; every lane has the sum.
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

// Sum over the block, for every thread. `scratch` holds a float per warp, and is free again after the next barrier.
DEVICE float block_sum(float x, float *scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0;
  for (int warp = 0; warp < int(blockDim.x / 32); warp++) total += scratch[warp];
  return total;
}
