// A pool of one worker per core, alive from the first use to the end of the process. Work is cut into fixed ranges, so
// which thread runs a range never changes what the range computes.
#pragma once
#include <cstdint>

namespace sdxl {

int thread_count();

// Calls body(context, begin, end) for consecutive ranges of `grain` covering [0, count); returns when all are done.
void parallel_ranges(int64_t count, int64_t grain, void (*body)(void *, int64_t, int64_t), void *context);

template <class F> void parallel_for(int64_t count, int64_t grain, F &&body) {
  auto *pointer = &body;
  parallel_ranges(
      count, grain, [](void *context, int64_t begin, int64_t end) { (*static_cast<decltype(pointer)>(context))(begin, end); }, pointer);
}

} // namespace sdxl
