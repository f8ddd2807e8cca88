// Packing for the matrix product: operands become 32-bit words along k, in the layouts that the micro-kernel reads. What
// already lies in memory as such words is not copied for A; B always is, into panels, so that a panel streams.
#pragma once
#include "gemm.h"
#include "gemm_kernel.h"

#include <algorithm>

namespace sdxl::ARCH {
namespace {

constexpr int KC = 320;           // words of k in a block at most
constexpr int TILE_ROWS = 256;    // rows of a tile at most
constexpr int A_STRIDE = KC + 16; // an odd number of cache lines: MR rows must not share one cache set

template <class T> constexpr bool WORDS_IN_PLACE = sizeof(T) * PAIR<T> == sizeof(float);

template <class T> inline int words_of(int64_t count) { return int((count + PAIR<T> - 1) / PAIR<T>); }

// Up to LANES words that lie along k, from the first of `count` elements left; zero beyond them.
template <class T> inline vf words_along_k(const T *from, int count) {
  if constexpr (PAIR<T> == 2) {
    vf words{};
    if (count >= 2 * LANES) memcpy(&words, from, sizeof words);
    else memcpy(&words, from, size_t(count) * sizeof(T));
    return words;
  } else return load(from, count);
}

// LANES words that lie across k: `count` elements of one k, or of k and the k after it (null: zeros).
template <class T> inline vf words_across_k(const T *from, const T *next, int count) {
  if constexpr (PAIR<T> == 2) {
    uint16_t low[LANES] = {}, high[LANES] = {};
    const size_t bytes = size_t(std::min(count, LANES)) * sizeof(T);
    vh first, second{};
    if (count >= LANES) {
      memcpy(&first, from, sizeof first);
      if (next != nullptr) memcpy(&second, next, sizeof second);
    } else {
      memcpy(low, from, bytes);
      if (next != nullptr) memcpy(high, next, bytes);
      memcpy(&first, low, sizeof first);
      memcpy(&second, high, sizeof second);
    }
    return bit_cast<vf>(__builtin_convertvector(first, vu) | __builtin_convertvector(second, vu) << 16);
  } else return load(from, count);
}

// Lanes of a pair of rows in one step of a transpose. Steps 1 and 2 interleave elements, then pairs, within 128 bits;
// later ones pick the even or odd 128-bit quarters of both rows.
template <int... I> constexpr vi step_lanes(int step, int odd, std::integer_sequence<int, I...>) {
  if (step <= 2) return vi{(I / 4 * 4 + odd * 2 + (step == 1 ? I % 4 / 2 : I % 2) + ((step == 1 ? I % 2 : I % 4 / 2) * LANES))...};
  return vi{(((I / 4 * 2 + odd) % (LANES / 4)) * 4 + I % 4 + (I / 4 * 2 / (LANES / 4)) * LANES)...};
}

template <int STEP> inline void transpose_step(vf *v) {
  constexpr std::make_integer_sequence<int, LANES> all{};
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (i & STEP) continue;
    const vf a = v[i], b = v[i + STEP];
    v[i] = __builtin_shuffle(a, b, step_lanes(STEP, 0, all));
    v[i + STEP] = __builtin_shuffle(a, b, step_lanes(STEP, 1, all));
  }
}

// The rows of a LANES x LANES square become its columns.
inline void transpose(vf *v) {
  transpose_step<1>(v);
  transpose_step<2>(v);
  if constexpr (LANES > 4) transpose_step<4>(v);
  if constexpr (LANES > 8) transpose_step<8>(v);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 4) std::swap(v[i + 1], v[i + 2]); // steps 1 and 2 leave them crossed
}

// to[word][row], `stride` words from one word to the next: LANES words along k of LANES rows, of which `rows` exist and
// `count` elements of k are left. What lies four squares on in each row is fetched meanwhile.
template <class T> inline void pack_square(float *to, int stride, const T *const *from, int rows, int at, int count) {
  vf square[LANES];
  if (rows >= LANES && count >= LANES * PAIR<T>) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      square[i] = words_along_k(from[i] + at, LANES * PAIR<T>);
      __builtin_prefetch(from[i] + at + 4 * LANES * PAIR<T>);
    }
    transpose(square);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * stride, square[i]);
    return;
  }
  for (int i = 0; i < LANES; i++) square[i] = i < rows ? words_along_k(from[i] + at, count) : vf{};
  transpose(square);
  for (int i = 0; i < std::min(LANES, words_of<T>(count)); i++) store(to + i * stride, square[i]);
}

// One panel of B, `columns` of at most `width`, at k, into to[words][width], zero beyond the columns.
template <class T> void pack_b(float *to, int width, const Operand<T> &b, Range columns, Range k) {
  const int words = words_of<T>(k.count()), count = columns.count();
  const T *from[2 * KC];
  T scratch[2 * KC * WIDE_PANEL];
  if (!b.rows_are_k) {
    b.rows.fetch(from, columns, k, scratch);
    for (int j = 0; j < width; j += LANES)
      for (int w = 0; w < words; w += LANES)
        pack_square(to + w * width + j, width, from + j, count - j, w * PAIR<T>, k.count() - w * PAIR<T>);
    return;
  }
  b.rows.fetch(from, k, columns, scratch);
  for (int w = 0; w < words; w++) {
    const T *first = from[w * PAIR<T>], *second = PAIR<T> == 2 && 2 * w + 1 < k.count() ? from[2 * w + 1] : nullptr;
    __builtin_prefetch(first + width);
    if (second != nullptr) __builtin_prefetch(second + width);
    for (int j = 0; j < width; j += LANES) {
      const T *next = second == nullptr ? second : second + j;
      if (j + LANES <= count) store(to + w * width + j, words_across_k(first + j, next, LANES));
      else store(to + w * width + j, j < count ? words_across_k(first + j, next, count - j) : vf{});
    }
  }
}

// Rows of A in the micro-kernel's hands: `count` rows from `row` on, at `words` words of k from word `at` on.
struct Piece {
  const float *data;
  int64_t stride;
  int row, count, at, words;
};
constexpr int MAX_PIECES = MAX_STRIPS + TILE_ROWS;

// Rows a multiple of 4096 bytes apart share one set of the first-level cache: as many as it certainly has room for.
constexpr int SAME_SET_ROWS = 7;

// Cuts rows into evenly high pieces of at most `most`.
inline int cut(Piece *to, Piece strip, int64_t row_step, int most) {
  if (row_step * int64_t(sizeof(float)) % 4096 == 0) most = std::min(most, SAME_SET_ROWS);
  const int pieces = (strip.count + most - 1) / most;
  for (int i = 0; i < pieces; i++) {
    const int begin = strip.count * i / pieces, end = strip.count * (i + 1) / pieces;
    to[i] = {strip.data + begin * row_step, strip.stride, strip.row + begin, end - begin, strip.at, strip.words};
  }
  return pieces;
}

// A's rows at k, in place or packed into space[TILE_ROWS * (A_STRIDE + LANES)]; k-major where a.rows_are_k. Gathers through
// scratch[PAIR * KC * TILE_ROWS]. Returns the number of pieces, of at most `most` rows.
template <class T>
int left_pieces(Piece *to, const Operand<T> &a, Range rows, Range k, int most, float *space, T *scratch) {
  const int words = words_of<T>(k.count());
  Strip<T> strips[MAX_STRIPS];
  if (WORDS_IN_PLACE<T> && !a.rows_are_k) {
    const int found = a.rows.strips(strips, rows, k);
    int pieces = 0;
    for (int i = 0; i < found; i++) {
      const Strip<T> &s = strips[i];
      const int at = int(s.columns.begin - k.begin) / PAIR<T>, stride = int(s.stride / PAIR<T>);
      pieces += cut(to + pieces, {reinterpret_cast<const float *>(s.data), stride, s.first, s.count, at, words_of<T>(s.columns.count())}, stride, most);
    }
    if (found >= 0) return pieces;
  }
  if (PAIR<T> == 1 && WORDS_IN_PLACE<T> && a.rows_are_k && a.rows.strips(strips, k, rows) == 1)
    return cut(to, {reinterpret_cast<const float *>(strips[0].data), strips[0].stride, 0, rows.count(), 0, words}, 1, most);
  const T *from[TILE_ROWS > 2 * KC ? TILE_ROWS : 2 * KC];
  if (a.rows_are_k) {
    a.rows.fetch(from, k, rows, scratch);
    const int stride = (rows.count() + LANES - 1) / LANES * LANES + LANES;
    for (int w = 0; w < words; w++) {
      const T *first = from[w * PAIR<T>], *second = PAIR<T> == 2 && 2 * w + 1 < k.count() ? from[2 * w + 1] : nullptr;
      for (int j = 0; j < rows.count(); j += LANES)
        store(space + w * stride + j, words_across_k(first + j, second == nullptr ? second : second + j, rows.count() - j));
    }
    return cut(to, {space, stride, 0, rows.count(), 0, words}, 1, most);
  }
  a.rows.fetch(from, rows, k, scratch);
  for (int i = 0; i < rows.count(); i++)
    for (int w = 0; w < words; w += LANES)
      store(space + i * A_STRIDE + w, words_along_k(from[i] + w * PAIR<T>, k.count() - w * PAIR<T>));
  return cut(to, {space, A_STRIDE, 0, rows.count(), 0, words}, A_STRIDE, most);
}

} // namespace
} // namespace sdxl::ARCH
