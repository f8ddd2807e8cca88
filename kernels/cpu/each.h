// Loops over the elements of a tensor, a vector at a time, on all threads; and scratch memory for one launch.
#pragma once
#include "simd.h"
#include "threads.h"

#include <new>

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

// Scratch numbers of one launch, from a cache line's boundary on.
struct Floats {
  static constexpr std::align_val_t LINE{64};
  float *data;
  explicit Floats(int64_t count) : data(static_cast<float *>(::operator new(size_t(count) * sizeof(float), LINE))) {}
  ~Floats() { ::operator delete(data, LINE); }
  Floats(const Floats &) = delete;
};

} // namespace
} // namespace ARCH
} // namespace sdxl
