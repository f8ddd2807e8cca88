// The packed matrix product (after BLIS, Van Zee & van de Geijn 2015): tiles of C, each summed over blocks of k in a buffer
// that stays in the second-level cache. A is read in place where its layout allows. B is packed a chunk of columns at a
// time for all threads, or, where one tile holds all rows of C and so meets a panel of B once, by the tile itself. Where
// both lie along k, few rows change places with B: weights are then read in place, and the few rows are packed.
#include "gemm.h"
#include "gemm_output.h"
#include "gemm_pack.h"
#include "threads.h"

#include <algorithm>

namespace sdxl::ARCH {
namespace {

constexpr int64_t SUMS = 64 << 10;       // floats of a tile's sums
constexpr int64_t CHUNK = 3 << 20;       // words of B packed at once: few enough for the shared cache
constexpr int MIDDLE_ROWS = 128;         // rows of a tile where C has more than TILE_ROWS
constexpr int TILE_COLUMNS = 320;        // columns of such a tile at most
constexpr int FLIPPED_COLUMNS = 128;     // columns of a tile of a flipped product at most
constexpr int COLUMN_STEP = 2 * GEGLU_BLOCK;

// Memory that a thread keeps between calls.
class Workspace {
public:
  float *floats(int64_t count) {
    if (count > capacity) {
      sdxl_free(memory);
      capacity = count;
      memory = static_cast<float *>(sdxl_alloc(capacity * int64_t(sizeof(float))));
      if (memory == nullptr) abort();
    }
    return memory;
  }
  ~Workspace() { sdxl_free(memory); }

private:
  float *memory = nullptr;
  int64_t capacity = 0;
};

thread_local Workspace b_workspace, a_workspace, sums_workspace, scratch_workspace;

// k cut into blocks of at most KC words. Where A's columns lie together in runs, a block is an even part of a run or
// several whole runs, so that its rows can be read in place.
template <class T> struct Blocks {
  int64_t k, run, step, per_run, count;
  Blocks(int64_t k, int64_t run) : k(k), run(run) {
    constexpr int64_t most = KC * PAIR<T>, grain = LANES * PAIR<T>;
    if (this->run <= 0 || this->run % PAIR<T> != 0) this->run = std::max<int64_t>(k, 1);
    if (this->run < most) this->run *= most / this->run;
    per_run = (this->run + most - 1) / most;
    step = std::min(most, ((this->run + per_run - 1) / per_run + grain - 1) / grain * grain);
    count = (k + this->run - 1) / this->run * per_run;
  }
  Range operator[](int64_t i) const {
    const int64_t first = i / per_run * run, last = std::min(k, first + run), at = first + i % per_run * step;
    return {std::min(at, last), std::min(at + step, last)};
  }
};

template <class T> struct Product {
  const Output<T> &c;
  const Operand<T> &a, &b;
  int64_t m, n, k;
  Blocks<T> blocks;
  bool flipped = false; // the product is C^T = B^T A^T

  // Of the panel of B where `left` columns are left.
  int width_of(int64_t left) const {
    return left <= LANES ? LANES : flipped && left > PANEL && left <= WIDE_PANEL ? WIDE_PANEL : PANEL;
  }
  int most_rows() const { return flipped && n > PANEL && (n - 1) / LANES % 2 == 0 ? WIDE_MR : MR; }
};

inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

// One tile of C: rows x columns, all of k. `packed` holds the columns of `chunk` of B, or is null: then B is packed here.
template <class T>
void compute_tile(const Product<T> &p, const float *packed, Range chunk, Range rows, Range columns) {
  const int64_t chunk_stride = whole_vectors(chunk.count()), stride = whole_vectors(columns.count());
  float *sums = sums_workspace.floats(whole_vectors(rows.count()) * stride);
  float *space = a_workspace.floats(TILE_ROWS * (A_STRIDE + LANES));
  T *scratch = reinterpret_cast<T *>(scratch_workspace.floats(2 * KC * TILE_ROWS));
  alignas(64) float panel[KC * WIDE_PANEL];
  Piece pieces[MAX_PIECES];
  bool add = false;
  for (int64_t block = 0; block < p.blocks.count; block++) {
    const Range k = p.blocks[block];
    const int words = words_of<T>(k.count()), count = left_pieces(pieces, p.a, rows, k, p.most_rows(), space, scratch);
    if (!add) {
      int covered = 0;
      for (int i = 0; i < count; i++) covered += pieces[i].at == 0 ? pieces[i].count : TILE_ROWS + 1;
      if (covered != rows.count()) {
        std::fill(sums, sums + rows.count() * stride, 0.0f);
        add = true;
      }
    }
    for (int64_t j = columns.begin, width; j < columns.end; j += width) {
      width = p.width_of(columns.end - j);
      const float *right = packed + k.begin / PAIR<T> * chunk_stride + (j - chunk.begin) * words;
      if (packed == nullptr) {
        pack_b(panel, int(width), p.b, {j, std::min(columns.end, j + width)}, k);
        right = panel;
      }
      for (int i = 0; i < count; i++) {
        const Piece &piece = pieces[i];
        kernel_for<PAIR<T> == 2>(p.a.rows_are_k, int(width / LANES), piece.count)(
            sums + piece.row * stride + j - columns.begin, stride, piece.data, piece.stride, right + piece.at * width, piece.words, add);
      }
    }
    add = true;
  }
  if (!add) std::fill(sums, sums + rows.count() * stride, 0.0f);
  if (p.flipped) write_flipped_tile(p.c, sums, stride, rows, columns);
  else write_tile(p.c, sums, stride, rows, columns);
}

// Packs the chunk into to[block][panel][words][width].
template <class T> void pack_chunk(float *to, const Product<T> &p, Range chunk) {
  const int64_t panels = (chunk.count() + PANEL - 1) / PANEL;
  parallel_for(panels * p.blocks.count, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const Range k = p.blocks[i % p.blocks.count];
      const int64_t at = i / p.blocks.count * PANEL, left = chunk.count() - at;
      if (at > 0 && left <= LANES && p.width_of(left + PANEL) == WIDE_PANEL) continue; // the panel before has them
      const int width = p.width_of(left);
      pack_b(to + k.begin / PAIR<T> * whole_vectors(chunk.count()) + at * words_of<T>(k.count()), width, p.b,
             {chunk.begin + at, std::min(chunk.end, chunk.begin + at + width)}, k);
    }
  });
}

// The columns of a tile: at most `most`, even over n, and narrower where the tiles are too few to share out.
int64_t tile_columns(int64_t n, int64_t most, int64_t down) {
  const auto even = [&](int64_t along) { return ((n + along - 1) / along + COLUMN_STEP - 1) / COLUMN_STEP * COLUMN_STEP; };
  int64_t along = (n + most - 1) / most;
  while (down * along < 6 * thread_count() && even(along) > COLUMN_STEP) along++;
  return even(along);
}

template <class T> void compute_columns(const Product<T> &p, const float *packed, Range chunk, int64_t height, int64_t width) {
  const int64_t along = (chunk.count() + width - 1) / width, down = (p.m + height - 1) / height;
  parallel_for(down * along, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      // Flipped, a thread goes down the rows of its share of the columns, whose panels stay in its cache.
      const int64_t row = (p.flipped ? i % down : i / along) * height;
      const int64_t column = chunk.begin + (p.flipped ? i / down : i % along) * width;
      compute_tile(p, packed, chunk, {row, std::min(p.m, row + height)}, {column, std::min(chunk.end, column + width)});
    }
  });
}

// C^T = B^T A^T for few rows of A: packing B would cost as much as several of them.
template <class T> void flipped_product(const Product<T> &p) {
  const int64_t words = p.blocks.count == 0 ? 0 : words_of<T>(p.k) + LANES;
  float *packed = b_workspace.floats(words * whole_vectors(p.n));
  pack_chunk(packed, p, {0, p.n});
  const int64_t tiles = (p.n + FLIPPED_COLUMNS - 1) / FLIPPED_COLUMNS, even = (p.n + tiles - 1) / tiles;
  compute_columns(p, packed, {0, p.n}, tile_columns(p.m, MIDDLE_ROWS, 1), (even + PANEL - 1) / PANEL * PANEL);
}

constexpr int THIN_ROWS = 4, THIN_COLUMNS = 64;
static_assert(THIN_COLUMNS % (2 * GEGLU_BLOCK) == 0, "values and their gates leave together");

// to[i] = left[i] * right over k: M rows of words, `stride` apart, with sums in registers.
template <class T, int M> inline void thin_column(float *to, int64_t to_stride, const float *left, int64_t stride, const T *right, int64_t k) {
  constexpr int64_t STEP = LANES * PAIR<T>;
  vf sums[M][2] = {};
  const auto add = [&](int part, int64_t at, vf x) {
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) sums[i][part] = multiply_add<PAIR<T> == 2>(sums[i][part], load(left + i * stride + at / PAIR<T>), x);
  };
  int64_t at = 0;
  for (; at + 2 * STEP <= k; at += 2 * STEP) {
    add(0, at, words_along_k(right + at, int(STEP)));
    add(1, at + STEP, words_along_k(right + at + STEP, int(STEP)));
  }
  for (; at < k; at += STEP) add(0, at, words_along_k(right + at, int(k - at)));
#pragma GCC unroll 4
  for (int i = 0; i < M; i++) to[i * to_stride] = reduce_add(sums[i][0] + sums[i][1]);
}

// A few rows times a B that lies along k: memory bound, so B is read in place, once.
template <class T, int M> void thin_product(const Product<T> &p) {
  const int64_t stride = whole_vectors(words_of<T>(p.k));
  float *left = b_workspace.floats(M * stride);
  const T *from[M];
  p.a.rows.fetch(from, {0, M}, {0, p.k}, nullptr);
  for (int i = 0; i < M; i++)
    for (int64_t w = 0; w < stride; w += LANES)
      store(left + i * stride + w, words_along_k(from[i] + w * PAIR<T>, int(p.k - w * PAIR<T>)));
  parallel_for(p.n, THIN_COLUMNS, [&](int64_t first, int64_t last) {
    float values[M][THIN_COLUMNS];
    const T *row[THIN_COLUMNS];
    p.b.rows.fetch(row, {first, last}, {0, p.k}, nullptr);
    for (int64_t j = 0; j < last - first; j++) thin_column<T, M>(&values[0][j], THIN_COLUMNS, left, stride, row[j], p.k);
    write_tile(p.c, values[0], THIN_COLUMNS, {0, M}, {first, last});
  });
}

} // namespace

template <class T>
void gemm(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int64_t m, int64_t n, int64_t k) {
  if (m <= 0 || n <= 0) return;
  const bool along_k = !a.rows_are_k && !b.rows_are_k;
  const Product<T> p{c, a, b, m, n, k, {k, a.rows_are_k ? 0 : a.rows.run()}};
  if (m <= THIN_ROWS && along_k && a.rows.run() == 0 && b.rows.run() == 0) {
    constexpr void (*thin[])(const Product<T> &) = {thin_product<T, 1>, thin_product<T, 2>, thin_product<T, 3>, thin_product<T, 4>};
    return thin[m - 1](p);
  }
  if (m <= TILE_ROWS && along_k) return flipped_product<T>({c, b, a, n, m, k, {k, 0}, true});
  if (m <= TILE_ROWS) return compute_columns(p, nullptr, {0, n}, m, tile_columns(n, std::max<int64_t>(SUMS / m / COLUMN_STEP, 1) * COLUMN_STEP, 1));
  const int64_t down = (m + MIDDLE_ROWS - 1) / MIDDLE_ROWS, height = (m + down - 1) / down;
  const int64_t words = p.blocks.count == 0 ? 0 : words_of<T>(k) + LANES, width = tile_columns(n, TILE_COLUMNS, down);
  const int64_t chunk = std::max<int64_t>(CHUNK / std::max<int64_t>(words, 1) / width, 1) * width;
  float *packed = b_workspace.floats(words * ((std::min(n, chunk) + PANEL - 1) / PANEL * PANEL));
  for (int64_t begin = 0; begin < n; begin += chunk) {
    const Range columns{begin, std::min(n, begin + chunk)};
    pack_chunk(packed, p, columns);
    compute_columns(p, packed, columns, height, width);
  }
}

template void gemm(const Output<float> &, const Operand<float> &, const Operand<float> &, int64_t, int64_t, int64_t);
template void gemm(const Output<bf16> &, const Operand<bf16> &, const Operand<bf16> &, int64_t, int64_t, int64_t);
template void gemm(const Output<f16> &, const Operand<f16> &, const Operand<f16> &, int64_t, int64_t, int64_t);

} // namespace sdxl::ARCH
