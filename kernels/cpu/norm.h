// What the norms share: rows cut into chunks, the unit of work and of the order of summation, and sums over a row. Chunks of rows
// are summed in float32 and added up in order in float64. They depend on the shape alone, so results do not depend on the number
// of threads.
#pragma once
#include "finish.h"
#include "threads.h"

#include <algorithm>
#include <type_traits>
#include <vector>

namespace sdxl {
namespace ARCH {
namespace {

// Images cut into chunks of rows: the unit of work, and of the order of summation. They are nearly equal and even in
// number, so that two threads get the same share.
struct Chunks {
  int n, hw, c, rows, per_image;
  Chunks(int n, int hw, int c) : n(n), hw(hw), c(c) {
    const int64_t wanted = (int64_t(hw) * c / 65536 + 2) / 2 * 2;
    rows = std::max(8, int((hw + wanted - 1) / wanted));
    per_image = (hw + rows - 1) / rows;
  }
  int64_t count() const { return int64_t(n) * per_image; }
  int rows_of(int64_t chunk) const { return std::min(rows, hw - int(chunk % per_image) * rows); }
  int64_t image(int64_t chunk) const { return chunk / per_image; }

  // body(chunk, its first row counted over all images, how many rows)
  template <class F> void each(F &&body) const {
    const int64_t grain = std::max<int64_t>(1, GRAIN / (int64_t(rows) * c));
    parallel_for(count(), grain, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++)
        body(chunk, image(chunk) * hw + chunk % per_image * rows, rows_of(chunk));
    });
  }
};

typedef std::vector<float> Row;

// Calls body(k, lanes) for each vector of a row of c: `lanes` is the constant LANES but for what may be left at the end, so
// that loads and stores of whole vectors cost no test.
template <class F> inline void each_vector(int c, F &&body) {
  int k = 0;
  for (; k + LANES <= c; k += LANES) body(k, std::integral_constant<int, LANES>());
  if (k < c) body(k, c - k);
}

inline vf first_lanes(vf x, int count) {
  vi place;
  for (int i = 0; i < LANES; i++) place[i] = i;
  return place < count ? x : vf{};
}

// The sum of term(k, lanes) over a row: four sums side by side, as one would wait for its own last addition.
template <class F> inline float row_sum(int c, F &&term) {
  constexpr std::integral_constant<int, LANES> all;
  vf totals[4] = {};
  int k = 0;
  for (; k + 4 * LANES <= c; k += 4 * LANES)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) totals[i] += term(k + i * LANES, all);
  for (; k + LANES <= c; k += LANES) totals[0] += term(k, all);
  if (k < c) totals[1] += first_lanes(term(k, c - k), c - k);
  return reduce_add((totals[0] + totals[1]) + (totals[2] + totals[3]));
}

} // namespace
} // namespace ARCH
} // namespace sdxl
