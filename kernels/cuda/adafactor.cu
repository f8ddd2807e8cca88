// One step of Adafactor (Shazeer & Stern 2018) as transformers' with a given learning rate, all parameters together. A matrix
// [outer, rows, columns, inner] keeps the means of its squared gradients over columns and over rows, per outer and inner. A
// linear layer is one matrix of inner 1, which blocks share by tiles. A convolution [o, kh, kw, i] has one of kh x kw for each
// pair of channels, and a thread has all of it; so it has an element of a vector, 1 x 1 with one moment for both. An update's
// root mean square is needed before the first weight changes, so a step is several launches (engine/cuda/plan_adafactor.ts).
#include "optimizer.cuh"
#include "wide.cuh"

struct Row {
  T *weight;
  float *master;
  const T *gradient;
  // The means over columns and over rows; a vector's are the same.
  float *row, *col;
  int outer, rows, columns, inner;
  float gradient_scale, beta2, one_minus_beta2, eps, lr, decay, clip_threshold;
  Rounding rounding;
};

DEVICE float moment(const Row &row, float old, float mean) { return old * row.beta2 + row.one_minus_beta2 * mean; }

// body(Run<N>()) with N neighbours to a lane: 16 bytes of T where lines of `length` are whole runs of them, else 1.
template <int N> struct Run {
  static constexpr int SIZE = N;
};
template <class F> DEVICE void by_runs(int length, F &&body) {
  if (length % WIDE<T> == 0) body(Run<WIDE<T>>());
  else body(Run<1>());
}

template <int N> DEVICE void read_floats(const float *p, float (&x)[N]) {
  if constexpr (N == 1) x[0] = *p;
  else
#pragma unroll
    for (int j = 0; j < N; j += PACK) {
      const Pack part = load(p + j, PACK, true);
#pragma unroll
      for (int k = 0; k < PACK; k++) x[j + k] = part.at[k];
    }
}
template <int N> DEVICE void write_floats(float *p, const float (&x)[N]) {
  if constexpr (N == 1) *p = x[0];
  else
#pragma unroll
    for (int j = 0; j < N; j += PACK) store(p + j, Pack{{x[j], x[j + 1], x[j + 2], x[j + 3]}}, PACK, true);
}

// The weights of a run become weight * decay - gradient * size.
template <int N> DEVICE void move(const Row &row, const Weights &weights, uint32_t i, const float (&size)[N]) {
  const Neighbours<T, N> g(row.gradient + i);
  float w[N];
  if (weights.master) read_floats(weights.master + i, w);
  else {
    const Neighbours<T, N> old(weights.weight + i);
#pragma unroll
    for (int j = 0; j < N; j++) w[j] = old.at(j);
  }
#pragma unroll
  for (int j = 0; j < N; j++) w[j] = w[j] * row.decay - g.at(j) * size[j];
  if (weights.master) write_floats(weights.master + i, w);
  weights.round(i, w);
  if constexpr (N == 1) weights.weight[i] = from_float<T>(w[0]);
  else if constexpr (sizeof(T) == 4) write_floats(weights.weight + i, w);
  else put_wide(weights.weight + i, w);
}

// ---- linear layers: a chunk is a tile of TILE rows and columns

constexpr int TILE = 256, LINES = 2 * TILE, WARPS = THREADS / 32;

struct Tile {
  // Of TILE columns, and this one's among them; elements from the matrix's first to this tile's.
  int across, right, down, height, width;
  uint32_t from;
  __device__ Tile(const Row &row, int tile)
      : across((row.columns + TILE - 1) / TILE), right(tile % across), down(tile / across), height(min(TILE, row.rows - down * TILE)),
        width(min(TILE, row.columns - right * TILE)), from((uint32_t(down) * row.columns + right) * TILE) {}
};

// body(r, run) for every row that this warp has of a tile, with a run of N gradients in the lane's column c; past the width it
// reads as zero. The runs of some rows are on their way at a time.
template <int N, class F> DEVICE void down_rows(const Row &row, const Tile &tile, int c, F &&body) {
  constexpr int AHEAD = 4;
  const T *const from = row.gradient + tile.from + (c < tile.width ? c : 0);
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < tile.height; first += WARPS * AHEAD) {
    Neighbours<T, N> runs[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) {
      runs[a] = Neighbours<T, N>(from + uint32_t(min(first + a * WARPS, tile.height - 1)) * row.columns);
      runs[a].clear_unless(c < tile.width);
    }
#pragma unroll
    for (int a = 0; a < AHEAD; a++)
      if (first + a * WARPS < tile.height) body(first + a * WARPS, runs[a]);
  }
}

// body(run, c) for every column that begins a run of this lane, in rounds that the whole warp makes.
template <class F> DEVICE void each_column(const Row &row, const Tile &tile, F &&body) {
  by_runs(row.columns, [&](auto run) {
    constexpr int N = decltype(run)::SIZE;
#pragma unroll 1
    for (int left = 0; left < tile.width; left += 32 * N) body(run, left + int(threadIdx.x % 32) * N);
  });
}

// sums[tile]: of the squares in each of its rows, then in each of its columns.
KERNEL(adafactor_sums)(float *sums, const Row *rows, const int *first_tile, int count) {
  __shared__ float scratch[WARPS][TILE];
  each_chunk(rows, first_tile, count, [&](const Row &row, int index, int number) {
    const Tile tile(row, index);
    float *const own = sums + int64_t(number) * LINES;
    each_column(row, tile, [&](auto run, int c) {
      constexpr int N = decltype(run)::SIZE;
      const float eps = c < tile.width ? row.eps : 0.f;
      float column[N] = {};
      down_rows<N>(row, tile, c, [&](int r, const Neighbours<T, N> &gradients) {
        float total = 0;
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float g = gradients.at(j) * row.gradient_scale, square = g * g + eps;
          total += square;
          column[j] += square;
        }
        total = warp_sum(total);
        if (threadIdx.x % 32 == 0) own[r] = c == 0 ? total : own[r] + total;
      });
#pragma unroll
      for (int j = 0; j < N; j++) scratch[threadIdx.x / 32][c + j] = column[j];
    });
    __syncthreads();
    if (int(threadIdx.x) < tile.width) {
      float total = 0;
#pragma unroll
      for (int warp = 0; warp < WARPS; warp++) total += scratch[warp][threadIdx.x];
      own[TILE + threadIdx.x] = total;
    }
    __syncthreads();
  });
}

// A block to each matrix: the moments from those sums and, where the first tile of each row and column of tiles has its sums,
// what multiplies the gradients of a row (gradient_scale * sqrt(mean of row / row)) and of a column (1 / sqrt(col)).
KERNEL(adafactor_factors)(float *sums, const Row *rows, const int *first_tile, int count) {
  __shared__ float scratch[WARPS];
  for (int which = blockIdx.x; which < count; which += gridDim.x) {
    const Row row = rows[which];
    const int across = (row.columns + TILE - 1) / TILE, down = (row.rows + TILE - 1) / TILE;
    float *const own = sums + int64_t(first_tile[which]) * LINES;
    const auto joined_sums = [](const float *from, int tiles, int step) {
      float total = 0;
#pragma unroll 4
      for (int t = 0; t < tiles; t++) total += from[int64_t(t) * step * LINES];
      return total;
    };
    float total = 0;
#pragma unroll 1
    for (int r = threadIdx.x, t = 0; r < row.rows; r += THREADS, t++) {
      const float sum = joined_sums(own + int64_t(t) * across * LINES + threadIdx.x, across, 1);
      const float now = moment(row, row.row[r], sum / float(row.columns));
      row.row[r] = now;
      total += now;
    }
    const float root = row.gradient_scale * sqrtf(block_sum(total, scratch) / float(row.rows));
#pragma unroll 1
    for (int r = threadIdx.x, t = 0; r < row.rows; r += THREADS, t++)
      own[int64_t(t) * across * LINES + threadIdx.x] = root * rsqrtf(row.row[r]);
#pragma unroll 1
    for (int c = threadIdx.x, t = 0; c < row.columns; c += THREADS, t++) {
      float *const at = own + int64_t(t) * LINES + TILE + threadIdx.x;
      const float now = moment(row, row.col[c], joined_sums(at, down, across) / float(row.rows));
      row.col[c] = now;
      *at = rsqrtf(now);
    }
    __syncthreads();
  }
}

// Of a tile: its rows' factors, and its columns'.
struct Factors {
  const float *row, *col;
  __device__ Factors(const float *sums, int first, const Tile &tile)
      : row(sums + int64_t(first + tile.down * tile.across) * LINES), col(sums + int64_t(first + tile.right) * LINES + TILE) {}
};

// partial[tile]: the sum of the squared updates.
KERNEL(adafactor_squares)(float *partial, const float *sums, const Row *rows, const int *first_tile, int count) {
  __shared__ float scratch[WARPS];
  each_chunk(rows, first_tile, count, [&](const Row &row, int index, int number) {
    const Tile tile(row, index);
    const Factors factors(sums, number - index, tile);
    float total = 0;
    each_column(row, tile, [&](auto run, int c) {
      constexpr int N = decltype(run)::SIZE;
      float col[N] = {};
      if (c < tile.width) read_floats(factors.col + c, col);
      down_rows<N>(row, tile, c, [&](int r, const Neighbours<T, N> &gradients) {
        const float own = factors.row[r];
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float u = gradients.at(j) * own * col[j];
          total += u * u;
        }
      });
    });
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[number] = total;
    __syncthreads();
  });
}

// A block to each parameter: the first of its sums becomes lr / max(1, rms / clip_threshold).
KERNEL(adafactor_size)(float *partial, const Row *rows, const int *first_chunk, int count) {
  for (int which = blockIdx.x; which < count; which += gridDim.x) {
    float *const own = partial + first_chunk[which];
    const double total = joined(own, first_chunk[which + 1] - first_chunk[which]);
    if (threadIdx.x == 0) {
      const Row row = rows[which];
      const double n = double(row.outer) * row.rows * row.columns * row.inner;
      const double excess = sqrt(total / n) / double(row.clip_threshold);
      own[0] = float(double(row.lr) / (excess > 1 ? excess : 1));
    }
    __syncthreads();
  }
}

KERNEL(adafactor_apply)(const float *partial, const float *sums, const Row *rows, const int *first_tile, int count) {
  each_chunk(rows, first_tile, count, [&](const Row &row, int index, int number) {
    const Tile tile(row, index);
    const Factors factors(sums, number - index, tile);
    const Weights weights = weights_of(row);
    const float step = partial[number - index];
    each_column(row, tile, [&](auto run, int c) {
      constexpr int N = decltype(run)::SIZE;
      if (c >= tile.width) return;
      float col[N], size[N];
      read_floats(factors.col + c, col);
#pragma unroll 1
      for (int r = threadIdx.x / 32; r < tile.height; r += WARPS) {
        const float own = step * factors.row[r];
#pragma unroll
        for (int j = 0; j < N; j++) size[j] = own * col[j];
        move(row, weights, tile.from + uint32_t(r) * row.columns + c, size);
      }
    });
  });
}

// ---- convolutions and vectors: a chunk is ROW_CHUNK pairs of channels [outer, inner], a thread has N neighbours at a time

template <class F> DEVICE void each_pair(const Row &row, int chunk, F &&body) {
  const uint32_t start = uint32_t(chunk) * ROW_CHUNK, end = min(start + ROW_CHUNK, uint32_t(row.outer) * row.inner);
  by_runs(row.inner, [&](auto run) {
    constexpr int N = decltype(run)::SIZE;
#pragma unroll 1
    for (uint32_t pair = start + threadIdx.x * N; pair < end; pair += THREADS * N)
      body(run, pair / row.inner * row.rows, pair / row.inner * row.columns, pair % row.inner);
  });
}

// Takes the squares of `count` gradients, `stride` apart, into the moments at `at`; a line of a kernel 3 x 3 is read at once.
template <int N> DEVICE void take(const Row &row, float *at, const T *from, uint32_t stride, int count) {
  float sum[N] = {}, now[N];
#pragma unroll 1
  for (int first = 0; first < count; first += 3) {
    Neighbours<T, N> runs[3];
#pragma unroll
    for (int a = 0; a < 3; a++) runs[a] = Neighbours<T, N>(from + min(first + a, count - 1) * stride);
#pragma unroll
    for (int a = 0; a < 3; a++)
      if (first + a < count)
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float g = runs[a].at(j) * row.gradient_scale;
          sum[j] += g * g + row.eps;
        }
  }
  read_floats(at, now);
#pragma unroll
  for (int j = 0; j < N; j++) now[j] = moment(row, now[j], sum[j] / float(count));
  write_floats(at, now);
}

// body(i, factor) for every tap of N pairs from `inner` on, whose matrices' rows and columns begin at the r-th and the c-th of
// all: element i and those beside it, and what multiplies their gradients.
template <int N, class F> DEVICE void each_tap(const Row &row, uint32_t r, uint32_t c, uint32_t inner, F &&body) {
  float root[N] = {}, by_row[N], factor[N];
#pragma unroll 1
  for (int k = 0; k < row.rows; k++) {
    read_floats(row.row + (r + k) * row.inner + inner, by_row);
#pragma unroll
    for (int j = 0; j < N; j++) root[j] += by_row[j];
  }
#pragma unroll
  for (int j = 0; j < N; j++) root[j] = row.gradient_scale * sqrtf(root[j] / float(row.rows));
#pragma unroll 1
  for (int k = 0; k < row.rows; k++) {
    read_floats(row.row + (r + k) * row.inner + inner, by_row);
#pragma unroll
    for (int j = 0; j < N; j++) by_row[j] = root[j] * rsqrtf(by_row[j]);
#pragma unroll 1
    for (int l = 0; l < row.columns; l++) {
      read_floats(row.col + (c + l) * row.inner + inner, factor);
#pragma unroll
      for (int j = 0; j < N; j++) factor[j] = by_row[j] * rsqrtf(factor[j]);
      body(((r + k) * row.columns + l) * row.inner + inner, factor);
    }
  }
}

// The moments, and partial[chunk]: the sum of the squared updates.
KERNEL(adafactor_tap_moments)(float *partial, const Row *rows, const int *first_chunk, int count) {
  __shared__ float scratch[WARPS];
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int number) {
    float total = 0;
    each_pair(row, chunk, [&](auto run, uint32_t r, uint32_t c, uint32_t inner) {
      constexpr int N = decltype(run)::SIZE;
      const uint32_t line = row.columns * row.inner;
      const T *const from = row.gradient + r * line + inner;
      if (row.row != row.col)
#pragma unroll 1
        for (int k = 0; k < row.rows; k++)
          take<N>(row, row.row + (r + k) * row.inner + inner, from + k * line, row.inner, row.columns);
#pragma unroll 1
      for (int l = 0; l < row.columns; l++)
        take<N>(row, row.col + (c + l) * row.inner + inner, from + l * row.inner, line, row.rows);
      each_tap<N>(row, r, c, inner, [&](uint32_t i, const float(&factor)[N]) {
        const Neighbours<T, N> g(row.gradient + i);
#pragma unroll
        for (int j = 0; j < N; j++) {
          const float u = g.at(j) * factor[j];
          total += u * u;
        }
      });
    });
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[number] = total;
    __syncthreads();
  });
}

KERNEL(adafactor_tap_apply)(const float *partial, const Row *rows, const int *first_chunk, int count) {
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int number) {
    const Weights weights = weights_of(row);
    const float step = partial[number - chunk];
    each_pair(row, chunk, [&](auto run, uint32_t r, uint32_t c, uint32_t inner) {
      constexpr int N = decltype(run)::SIZE;
      each_tap<N>(row, r, c, inner, [&](uint32_t i, const float(&factor)[N]) {
        float size[N];
#pragma unroll
        for (int j = 0; j < N; j++) size[j] = step * factor[j];
        move(row, weights, i, size);
      });
    });
  });
}
