// The packed matrix product (after BLIS, Van Zee & van de Geijn 2015): tiles of C, each summed over blocks of k in a buffer
// that stays in the second-level cache. A is read in place where its layout allows. B is packed a chunk of columns at a
// time for all threads, or, where one tile holds all rows of C and so meets a panel of B once, by the tile itself.
#include "gemm.h"
#include "gemm_output.h"
#include "gemm_pack.h"
#include "threads.h"

#include <algorithm>

extern "C" {
void *sdxl_alloc(int64_t bytes);
void sdxl_free(void *memory);
}

namespace sdxl::ARCH {
namespace {

constexpr int64_t SUMS = 64 << 10;       // floats of a tile's sums
constexpr int64_t CHUNK = 3 << 20;       // words of B packed at once: few enough for the shared cache
constexpr int MIDDLE_ROWS = 128;         // rows of a tile where C has more than TILE_ROWS
constexpr int TILE_COLUMNS = 320;        // columns of such a tile at most
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
  int width; // of a panel of B
};

// One tile of C: rows x columns, all of k. `packed` holds the columns of `chunk` of B, or is null: then B is packed here.
template <class T>
void compute_tile(const Product<T> &p, const float *packed, Range chunk, Range rows, Range columns) {
  const int64_t panels = (chunk.count() + p.width - 1) / p.width, stride = (columns.count() + p.width - 1) / p.width * p.width;
  float *sums = sums_workspace.floats(rows.count() * stride);
  float *space = a_workspace.floats(TILE_ROWS * (A_STRIDE + LANES));
  T *scratch = reinterpret_cast<T *>(scratch_workspace.floats(2 * KC * TILE_ROWS));
  alignas(64) float panel[KC * PANEL];
  Piece pieces[MAX_PIECES];
  bool add = false;
  for (int64_t block = 0; block < p.blocks.count; block++) {
    const Range k = p.blocks[block];
    const int words = words_of<T>(k.count()), count = left_pieces(pieces, p.a, rows, k, space, scratch);
    if (!add) {
      int covered = 0;
      for (int i = 0; i < count; i++) covered += pieces[i].at == 0 ? pieces[i].count : TILE_ROWS + 1;
      if (covered != rows.count()) {
        std::fill(sums, sums + rows.count() * stride, 0.0f);
        add = true;
      }
    }
    for (int64_t j = columns.begin; j < columns.end; j += p.width) {
      const float *right = packed + (k.begin / PAIR<T> * panels + (j - chunk.begin) / p.width * words) * p.width;
      if (packed == nullptr) {
        pack_b(panel, p.width, p.b, {j, std::min(columns.end, j + p.width)}, k);
        right = panel;
      }
      for (int i = 0; i < count; i++) {
        const Piece &piece = pieces[i];
        kernel_for<PAIR<T> == 2>(p.a.rows_are_k, p.width / LANES, piece.count)(
            sums + piece.row * stride + j - columns.begin, stride, piece.data, piece.stride, right + piece.at * p.width, piece.words, add);
      }
    }
    add = true;
  }
  if (!add) std::fill(sums, sums + rows.count() * stride, 0.0f);
  write_tile(p.c, sums, stride, rows, columns);
}

// Packs the chunk into to[block][panel][words][width].
template <class T> void pack_chunk(float *to, const Product<T> &p, Range chunk) {
  const int64_t panels = (chunk.count() + p.width - 1) / p.width;
  parallel_for(panels, 1, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; panel++)
      for (int64_t block = 0; block < p.blocks.count; block++) {
        const Range k = p.blocks[block];
        const int64_t column = chunk.begin + panel * p.width;
        pack_b(to + (k.begin / PAIR<T> * panels + panel * words_of<T>(k.count())) * p.width, p.width, p.b,
               {column, std::min(chunk.end, column + p.width)}, k);
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
      const int64_t row = i / along * height, column = chunk.begin + i % along * width;
      compute_tile(p, packed, chunk, {row, std::min(p.m, row + height)}, {column, std::min(chunk.end, column + width)});
    }
  });
}

constexpr int THIN_ROWS = 4, THIN_COLUMNS = 64;

// A few rows times a B that lies along k: memory bound, so B is read in place, once.
template <class T> void thin_product(const Product<T> &p) {
  const int m = int(p.m);
  const int64_t words = words_of<T>(p.k), stride = (words + LANES - 1) / LANES * LANES;
  float *left = b_workspace.floats(THIN_ROWS * stride);
  const T *from[THIN_COLUMNS];
  p.a.rows.fetch(from, {0, m}, {0, p.k}, nullptr);
  for (int i = 0; i < m; i++)
    for (int64_t w = 0; w < words; w += LANES)
      store(left + i * stride + w, words_along_k(from[i] + w * PAIR<T>, int(p.k - w * PAIR<T>)));
  parallel_for(p.n, THIN_COLUMNS, [&](int64_t first, int64_t last) {
    float values[THIN_ROWS][THIN_COLUMNS];
    const T *row[THIN_COLUMNS];
    p.b.rows.fetch(row, {first, last}, {0, p.k}, nullptr);
    for (int64_t j = first; j < last; j++) {
      const T *right = row[j - first];
      vf sums[THIN_ROWS][2] = {};
      for (int64_t w = 0; w < words; w += 2 * LANES) {
        const vf x = words_along_k(right + w * PAIR<T>, int(p.k - w * PAIR<T>));
        for (int i = 0; i < m; i++) sums[i][0] = multiply_add<PAIR<T> == 2>(sums[i][0], load(left + i * stride + w), x);
        if (w + LANES >= words) break;
        const vf next = words_along_k(right + (w + LANES) * PAIR<T>, int(p.k - (w + LANES) * PAIR<T>));
        for (int i = 0; i < m; i++) sums[i][1] = multiply_add<PAIR<T> == 2>(sums[i][1], load(left + i * stride + w + LANES), next);
      }
      for (int i = 0; i < m; i++) values[i][j - first] = reduce_add(sums[i][0] + sums[i][1]);
    }
    write_tile(p.c, values[0], THIN_COLUMNS, {0, m}, {first, last});
  });
}

} // namespace

template <class T>
void gemm(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int64_t m, int64_t n, int64_t k) {
  const Product<T> p{c, a, b, m, n, k, {k, a.rows_are_k ? 0 : a.rows.run()}, n <= LANES ? LANES : PANEL};
  if (m <= THIN_ROWS && !a.rows_are_k && !b.rows_are_k && a.rows.run() == 0 && b.rows.run() == 0) return thin_product(p);
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
