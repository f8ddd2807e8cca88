// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words from a counter
// and a key, as kernels/cpu/philox.h and engine/philox.ts draw them.
#pragma once
#include "common.cuh"

DEVICE uint4 philox_round(uint4 counter, uint32_t key0, uint32_t key1) {
  const uint32_t a_low = 0xd2511f53u * counter.x, a_high = __umulhi(0xd2511f53u, counter.x);
  const uint32_t b_low = 0xcd9e8d57u * counter.z, b_high = __umulhi(0xcd9e8d57u, counter.z);
  return make_uint4(b_high ^ counter.y ^ key0, b_low, a_high ^ counter.w ^ key1, a_low);
}

DEVICE uint4 philox(uint4 counter, uint32_t key0, uint32_t key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    counter = philox_round(counter, key0, key1);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

// Two counters to their words, side by side: where rounds are a loop, fewer registers let a third block onto a multiprocessor.
DEVICE void philox(uint4 &a, uint4 &b, uint32_t key0, uint32_t key1) {
#pragma unroll 1
  for (int round = 0; round < 10; round++) {
    a = philox_round(a, key0, key1);
    b = philox_round(b, key0, key1);
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
}
