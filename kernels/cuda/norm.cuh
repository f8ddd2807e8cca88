// What the group norms of norm.cu and norm_sm90.cu read: an image whose channels may lie in two tensors.
#pragma once
#include "common.cuh"

// [pixels, c], whose first `own` channels are x's and whose others are skip's.
struct Image {
  const T *x, *skip;
  int own, c;
  // Channel k of a pixel; those of the pixels that follow lie stride(k) apart.
  __device__ const T *at(int64_t pixel, int k) const { return k < own ? x + pixel * own + k : skip + pixel * (c - own) + k - own; }
  __device__ int stride(int k) const { return k < own ? own : c - own; }
};
