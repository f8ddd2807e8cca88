// Loops over the elements of a tensor, a vector at a time, on all threads; and scratch memory for one launch.
#pragma once
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

// body(i, count) for consecutive vectors of `count` elements: LANES, fewer in the last.
template <class F> inline void vectors(int64_t begin, int64_t end, F &&body) {
  for (int64_t i = begin; i < end; i += LANES) body(i, end - i);
}

template <class F> void each(int n, F &&body) {
  parallel_for(n, GRAIN, [&](int64_t begin, int64_t end) { vectors(begin, end, body); });
}

// Scratch numbers of one launch.
struct Floats {
  float *data;
  explicit Floats(int64_t count) : data(new float[size_t(count > 0 ? count : 1)]) {}
  ~Floats() { delete[] data; }
  Floats(const Floats &) = delete;
};

} // namespace
} // namespace ARCH
} // namespace sdxl
