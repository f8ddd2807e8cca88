// 16 bytes of a tensor in one load or store: four floats or eight of the half types. What is loaded stays as it lies until it is
// read, so that a thread can have much of it on its way.
#pragma once
#include "common.cuh"

// Elements of 16 bytes.
template <class S> constexpr int WIDE = 16 / sizeof(S);

// N neighbours from a boundary of N elements: WIDE of them, or one.
template <class S, int N> struct Neighbours {
  static_assert(N == WIDE<S>, "or 1, below");
  uint32_t words[4];
  __device__ Neighbours() {}
  __device__ explicit Neighbours(const S *p) {
    const uint4 all = *reinterpret_cast<const uint4 *>(p);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
  __device__ void clear_unless(bool kept) {
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = kept ? words[i] : 0;
  }
  __device__ float at(int i) const {
    if constexpr (sizeof(S) == 4) return __uint_as_float(words[i]);
    else return to_float(S{uint16_t(words[i / 2] >> i % 2 * 16)});
  }
};
template <class S> struct Neighbours<S, 1> {
  float only;
  __device__ Neighbours() {}
  __device__ explicit Neighbours(const S *p) : only(to_float(*p)) {}
  __device__ void clear_unless(bool kept) { only = kept ? only : 0.f; }
  __device__ float at(int) const { return only; }
};

// WIDE<S> values to a boundary of as many elements.
template <class S> DEVICE void put_wide(S *p, const float *x) {
  uint32_t words[4];
#pragma unroll
  for (int j = 0; j < 4; j++)
    if constexpr (sizeof(S) == 4) words[j] = __float_as_uint(x[j]);
    else words[j] = from_float<S>(x[2 * j]).bits | uint32_t(from_float<S>(x[2 * j + 1]).bits) << 16;
  *reinterpret_cast<uint4 *>(p) = make_uint4(words[0], words[1], words[2], words[3]);
}
