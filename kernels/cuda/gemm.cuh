// One matrix product under linear, matmul and conv2d: C[m, n] = A[m, k] B[k, n] with float32 sums. Operands are read only
// through views (a matrix, an im2col of an image, a flipped kernel) while their tiles are copied to shared memory, in
// STAGES stages ahead of the products. The half types multiply on tensor cores (mma.sync), float by fma. Sums leave
// through a slab of shared memory per warp, so that the epilogue is one short loop over whole rows.
// A view's rows either run along k ("along": the tile is [m or n][k]) or each belong to one k ("across": [k][m or n]).
#pragma once
#include "tile.cuh"

enum Activation { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3, GEGLU = 4 };

// Columns of a GEGLU product come in blocks: GEGLU_BLOCK of h, then the GEGLU_BLOCK gates that belong to them.
constexpr int GEGLU_BLOCK = 32;

// y[row, col] = activation(sum + bias[col] + shift[row / rows_per_shift, col]) + residual[row, col]; absent parts are null.
// Rows of y lie `stride` apart. With `partial` the plain sums go there instead, [batch and split][m][n].
struct Output {
  T *y;
  float *partial;
  const T *bias, *shift, *residual;
  int columns, stride, rows_per_shift, activation;
};

// The product's size. A k-range of `k_part` (a multiple of BLOCK_K) is one split; blockIdx.z counts splits within batches.
struct Problem {
  int m, n, k, splits, k_part;
};

// ---- views. line(r) is what a row has of its own, column(c) what a column has; at() joins them, null where nothing lies.

struct Matrix {
  const T *data;
  int rows, columns, stride;
  struct Line {
    const T *from;
  };
  typedef int Column;
  __device__ Line line(int r) const { return {r < rows ? data + int64_t(r) * stride : nullptr}; }
  __device__ Column column(int c) const { return c < columns ? c : -1; }
  __device__ const T *at(const Line &line, Column c) const { return line.from == nullptr || c < 0 ? nullptr : line.from + c; }
};

// weight[2n, k] in the column order that GEGLU wants of B's rows, where `half` is n; a plain matrix where `half` is 0.
struct Weight : Matrix {
  int half;
  __device__ Line line(int r) const {
    if (half == 0) return Matrix::line(r);
    const int place = r / (2 * GEGLU_BLOCK) * GEGLU_BLOCK + r % GEGLU_BLOCK;
    return {place < half ? data + int64_t(r / GEGLU_BLOCK % 2 * half + place) * stride : nullptr};
  }
};

// ---- tiles

// A block of WARPS_M x WARPS_N warps, each WARP_M x 64 of the result.
template <int WARP_M_, int WARPS_M, int WARPS_N> struct Shape {
  static constexpr int WARP_M = WARP_M_, WARP_N = 64, WARPS = WARPS_M * WARPS_N, COUNT = WARPS * 32;
  static constexpr int ACROSS = WARPS_N;
  static constexpr int M = WARP_M * WARPS_M, N = WARP_N * WARPS_N;
};
typedef Shape<64, 2, 2> Large; // 128 x 128, for operands whose rows are whole chunks
typedef Shape<16, 4, 1> Small; // 64 x 64, for everything else

constexpr int BLOCK_K = 64 / sizeof(T); // a tile row along k is 64 bytes
constexpr int STAGES = 3;
constexpr int SLAB_STRIDE = 72; // floats between rows of a slab: 64, and eight to keep the banks apart

// One operand's tile of WIDTH rows or columns: which chunks this thread copies, and its lines or columns, kept from step
// to step. `whole`: every chunk lies wholly inside or outside, on a 16-byte boundary; otherwise elements go one by one.
template <class View, bool ALONG, int WIDTH, int COUNT, bool LARGE> struct Operand {
  static constexpr int CHUNKS = ALONG ? BLOCK_K / CHUNK : WIDTH / CHUNK; // in a row
  static constexpr int ROWS = ALONG ? WIDTH : BLOCK_K;
  static constexpr int BYTES = WIDTH * BLOCK_K * int(sizeof(T));
  static constexpr int STEP = COUNT / CHUNKS, TURNS = ROWS / STEP;
  static_assert(ROWS % STEP == 0, "each thread copies as many chunks");
  const View view;
  const int chunk, first_row, start, k_end;
  const bool whole;
  typename View::Line lines[ALONG ? TURNS : 1];
  typename View::Column column;

  __device__ Operand(const View &view, int start, int k_end, bool whole)
      : view(view), chunk(threadIdx.x % CHUNKS), first_row(threadIdx.x / CHUNKS), start(start), k_end(k_end), whole(LARGE || whole),
        column(view.column(ALONG ? 0 : start + chunk * CHUNK)) {
    if constexpr (ALONG)
#pragma unroll
      for (int i = 0; i < TURNS; i++) lines[i] = view.line(start + first_row + i * STEP);
  }

  __device__ void copy(uint32_t tile, int k) {
    if constexpr (!LARGE)
      if (!whole) return copy_elements(tile, k);
    if constexpr (ALONG) column = view.column(k + chunk * CHUNK);
#pragma unroll
    for (int i = 0; i < TURNS; i++) {
      const int row = first_row + i * STEP;
      const T *from;
      if constexpr (ALONG) from = k + chunk * CHUNK < k_end ? view.at(lines[i], column) : nullptr;
      else from = k + row < k_end ? view.at(view.line(k + row), column) : nullptr;
      copy_async(tile + tile_offset<CHUNKS>(row, chunk), from == nullptr ? view.data : from, from != nullptr);
    }
  }

  __device__ void copy_elements(uint32_t tile, int k) {
#pragma unroll 1
    for (int i = 0; i < TURNS; i++) {
      const int row = first_row + i * STEP, r = ALONG ? start + row : k + row, c = (ALONG ? k : start) + chunk * CHUNK;
      const typename View::Line line = view.line(r);
#pragma unroll 1
      for (int e = 0; e < CHUNK; e++) {
        const T *from = (ALONG ? c + e : r) < k_end ? view.at(line, view.column(c + e)) : nullptr;
        T value = {};
        if (from != nullptr) value = *from;
        const uint32_t to = tile + tile_offset<CHUNKS>(row, chunk) + e * int(sizeof(T));
        put_shared(to, value);
      }
    }
  }
};

// ---- products of one step: sums += A tile x B tile

template <class S> struct Sums;

#if !defined(T_FLOAT32)

template <class S> struct Sums {
  static constexpr int DOWN = S::WARP_M / 16;
  float at[DOWN][8][4] = {};

  template <bool A_ALONG, bool B_ALONG> __device__ void add(uint32_t a_tile, uint32_t b_tile, int m, int n, int lane) {
    constexpr int A_CHUNKS = (A_ALONG ? BLOCK_K : S::M) / CHUNK, B_CHUNKS = (B_ALONG ? BLOCK_K : S::N) / CHUNK;
#pragma unroll
    for (int k = 0; k < BLOCK_K; k += 16) {
      uint32_t a[DOWN][4], b[4][4];
#pragma unroll
      for (int i = 0; i < DOWN; i++) {
        if constexpr (A_ALONG) load_a<A_CHUNKS>(a[i], a_tile, m + 16 * i, k, lane);
        else load_a_turned<A_CHUNKS>(a[i], a_tile, m + 16 * i, k, lane);
      }
#pragma unroll
      for (int j = 0; j < 4; j++) {
        if constexpr (B_ALONG) load_b<B_CHUNKS>(b[j], b_tile, n + 16 * j, k, lane);
        else load_b_turned<B_CHUNKS>(b[j], b_tile, n + 16 * j, k, lane);
      }
#pragma unroll
      for (int i = 0; i < DOWN; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) multiply(at[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // 16 rows from 16 * i into a slab.
  __device__ void to_slab(float *slab, int i, int lane) const {
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        *reinterpret_cast<float2 *>(slab + (lane / 4 + 8 * half) * SLAB_STRIDE + 8 * j + lane % 4 * 2) =
            make_float2(at[i][j][2 * half], at[i][j][2 * half + 1]);
  }
};

#else

// A lane has rows lane / 8 + 4 i and columns lane % 8 + 8 j of its warp's 16 x 64.
template <class S> struct Sums {
  static constexpr int DOWN = 1;
  static_assert(S::WARP_M == 16, "float32 has one shape");
  float at[4][8] = {};

  // Values at k .. k + 3 of row or column `place` of a tile.
  template <bool ALONG, int WIDTH> static __device__ void read(float (&to)[4], uint32_t tile, int place, int k) {
    if constexpr (ALONG) {
      asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                   : "r"(tile + tile_offset<BLOCK_K / CHUNK>(place, k / CHUNK))
                   : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < 4; i++)
        asm volatile("ld.shared.f32 %0, [%1];"
                     : "=f"(to[i])
                     : "r"(tile + tile_offset<WIDTH / CHUNK>(k + i, place / CHUNK) + place % CHUNK * 4)
                     : "memory");
    }
  }

  template <bool A_ALONG, bool B_ALONG> __device__ void add(uint32_t a_tile, uint32_t b_tile, int m, int n, int lane) {
#pragma unroll 1
    for (int k = 0; k < BLOCK_K; k += 4) {
      float a[4][4];
#pragma unroll
      for (int i = 0; i < 4; i++) read<A_ALONG, S::M>(a[i], a_tile, m + lane / 8 + 4 * i, k);
#pragma unroll
      for (int j = 0; j < 8; j++) {
        float b[4];
        read<B_ALONG, S::N>(b, b_tile, n + lane % 8 + 8 * j, k);
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
          for (int e = 0; e < 4; e++) at[i][j] += a[i][e] * b[e];
      }
    }
  }

  __device__ void to_slab(float *slab, int, int lane) const {
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int j = 0; j < 8; j++) slab[(lane / 8 + 4 * i) * SLAB_STRIDE + lane % 8 + 8 * j] = at[i][j];
  }
};

#endif

// ---- output

// x times the normal distribution's Phi(z).
#if defined(T_FLOAT32)
DEVICE float times_cdf(float x, float z) { return x * gelu_cdf(z); }
#else
// Phi(-|z|) = t 2^(q(t) - z^2 log2(e) / 2) with t = 1 / (1 + |z| / sqrt(8)), and q fitted for |z| up to 14: a relative error of 5e-8
// there beside that of float's sums, in 19 instructions where erfcf takes 50. Rounded to halves the tails are as true as erfcf's.
DEVICE float times_cdf(float x, float z) {
  const float t = fast_reciprocal(1.f + 0.35355339f * fabsf(z));
  float q = 0.204022056f;
  q = q * t - 0.954767409f;
  q = q * t + 1.60464949f;
  q = q * t - 0.919871775f;
  q = q * t - 0.184953451f;
  q = q * t + 0.0379925172f;
  q = q * t + 0.0378585457f;
  q = q * t + 0.560268676f;
  q = q * t + 1.44044367f;
  q = q * t - 2.82564226f;
  const float tail = t * exp2_of(q - 0.72134752f * z * z);
  return x * (z < 0.f ? tail : 1.f - tail);
}
#endif

// GELU and GEGLU are one product: the value or its gate with the normal distribution of it.
DEVICE float activate(float x, float gate, int activation) {
  if (activation == NONE) return x;
  const float z = activation == GEGLU ? gate : x;
  if (activation == GELU || activation == GEGLU) return times_cdf(activation == GEGLU ? x * z : z, z);
  return x / (1.f + expf(activation == SILU ? -x : -1.702f * x));
}

// WIDTH neighbours of a row: storage <-> float, one by one or a pack at once.
template <int WIDTH> struct Few {
  float at[WIDTH];
};
template <int WIDTH, class S> DEVICE Few<WIDTH> load_few(const S *p) {
  Few<WIDTH> x;
  if constexpr (WIDTH == PACK) {
    const Pack all = load(p, PACK);
    for (int j = 0; j < WIDTH; j++) x.at[j] = all.at[j];
  } else x.at[0] = to_float(*p);
  return x;
}
template <int WIDTH, class S> DEVICE void store_few(S *p, const Few<WIDTH> &x) {
  if constexpr (WIDTH == PACK) store(p, Pack{{x.at[0], x.at[1], x.at[2], x.at[3]}}, PACK);
  else *p = from_float<S>(x.at[0]);
}
template <int WIDTH> DEVICE void add_few(Few<WIDTH> &value, const T *from) {
  const Few<WIDTH> more = load_few<WIDTH>(from);
#pragma unroll
  for (int j = 0; j < WIDTH; j++) value.at[j] += more.at[j];
}

// The epilogue of WIDTH sums of a row, from `column` on; `gate` is read for GEGLU alone.
template <bool ACTIVE, int WIDTH> DEVICE void write_few(const Output &out, Few<WIDTH> value, Few<WIDTH> gate, int row, int column) {
  if (out.bias != nullptr) add_few(value, out.bias + column);
  if (out.shift != nullptr) add_few(value, out.shift + row / out.rows_per_shift * int64_t(out.columns) + column);
  if constexpr (ACTIVE) {
    if (out.activation == GEGLU && out.bias != nullptr) add_few(gate, out.bias + out.columns + column);
#pragma unroll
    for (int j = 0; j < WIDTH; j++) value.at[j] = activate(value.at[j], gate.at[j], out.activation);
  }
  if (out.residual != nullptr) add_few(value, out.residual + int64_t(row) * out.columns + column);
  store_few(out.y + int64_t(row) * out.stride + column, value);
}

// Rows of a warp's slab, whose first result is (row, column) of C. GEGLU's slab is 32 columns and their 32 gates.
template <bool ACTIVE, int WIDTH>
DEVICE void write_slab(const Output &out, const Problem &size, const float *slab, int rows, int row, int column, int lane) {
  float *partial = out.partial + int64_t(blockIdx.z) * size.m * size.n;
  const bool gated = ACTIVE && out.partial == nullptr && out.activation == GEGLU;
  const int width = gated ? GEGLU_BLOCK : 64, first = gated ? column / 2 : column, columns = out.partial ? size.n : out.columns;
#pragma unroll 1
  for (int i = lane * WIDTH; i < rows * width; i += 32 * WIDTH) {
    const int r = i / width, place = i % width, c = first + place;
    if (row + r >= size.m || c >= columns) continue;
    const float *from = slab + r * SLAB_STRIDE + place;
    const Few<WIDTH> value = load_few<WIDTH>(from);
    if (out.partial != nullptr) store_few(partial + int64_t(row + r) * size.n + c, value);
    else write_few<ACTIVE>(out, value, gated ? load_few<WIDTH>(from + GEGLU_BLOCK) : value, row + r, c);
  }
}

// ---- the product

// The tile of a block: neighbours in launch order share eight rows of tiles, so that what they read stays in L2.
template <class S> DEVICE void own_tile(int &m, int &n, const Problem &size) {
  constexpr int BAND = 8;
  const int down = (size.m + S::M - 1) / S::M, across = (size.n + S::N - 1) / S::N;
  const int band = blockIdx.x / (BAND * across), inside = blockIdx.x % (BAND * across);
  const int height = min(BAND, down - band * BAND);
  m = (band * BAND + inside % height) * S::M;
  n = inside / height * S::N;
}

extern __shared__ __align__(128) uint8_t shared[];

template <class S, bool A_ALONG, bool B_ALONG, bool ACTIVE, class A, class B>
DEVICE void gemm(const Output &out, const A &a_view, const B &b_view, const Problem &size, bool a_whole, bool b_whole) {
  constexpr bool LARGE = S::M == Large::M;
  int m, n;
  own_tile<S>(m, n, size);
  const int k_begin = blockIdx.z % size.splits * size.k_part, k_end = min(size.k, k_begin + size.k_part);
  Operand<A, A_ALONG, S::M, S::COUNT, LARGE> a(a_view, m, k_end, a_whole);
  Operand<B, B_ALONG, S::N, S::COUNT, LARGE> b(b_view, n, k_end, b_whole);
  constexpr int STAGE_BYTES = a.BYTES + b.BYTES;
  const uint32_t base = shared_address(shared);
  const auto copy_stage = [&](int stage, int k) {
    if (k < k_end) {
      a.copy(base + stage * STAGE_BYTES, k);
      b.copy(base + stage * STAGE_BYTES + a.BYTES, k);
    }
    copies_commit();
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp / S::ACROSS * S::WARP_M, warp_n = warp % S::ACROSS * S::WARP_N;
  Sums<S> sums;
  int stage = 1, next = 0; // where the ring is read and written; the first turns only copy
#pragma unroll 1
  for (int k = k_begin - (STAGES - 1) * BLOCK_K; k < k_end; k += BLOCK_K) {
    if (k >= k_begin) {
      copies_wait<STAGES - 2>();
      __syncthreads(); // this stage has arrived for every thread, and the one before it is read out
    }
    copy_stage(next, k + (STAGES - 1) * BLOCK_K);
    if (k >= k_begin) {
      const uint32_t tile = base + stage * STAGE_BYTES;
      sums.template add<A_ALONG, B_ALONG>(tile, tile + a.BYTES, warp_m, warp_n, lane);
    }
    stage = stage + 1 == STAGES ? 0 : stage + 1;
    next = next + 1 == STAGES ? 0 : next + 1;
  }
  __syncthreads(); // all copies were waited for: the groups of the last turns are empty

  // Two strips of 16 rows at a time. One loop with the strips picked inside it: the epilogue's text is long.
  constexpr int STRIPS = Sums<S>::DOWN < 2 ? Sums<S>::DOWN : 2;
  static_assert(S::WARPS * 16 * STRIPS * SLAB_STRIDE * 4 <= STAGES * STAGE_BYTES, "slabs fit where the stages were");
  float *slab = reinterpret_cast<float *>(shared) + warp * 16 * STRIPS * SLAB_STRIDE;
  // Where B's rows lie across and are whole chunks, so are those of y.
  const bool stores_packs = out.columns % PACK == 0 && out.stride % PACK == 0 && uint64_t(out.y) % sizeof(Stored<T>) == 0;
  const bool packs = (LARGE && !B_ALONG) || (out.partial ? size.n % PACK == 0 : stores_packs);
#pragma unroll 1
  for (int turn = 0; turn < Sums<S>::DOWN / STRIPS; turn++) {
    if (turn > 0) __syncwarp();
#pragma unroll
    for (int i = 0; i < Sums<S>::DOWN; i++)
      if (i / STRIPS == turn) sums.to_slab(slab + 16 * (i % STRIPS) * SLAB_STRIDE, i, lane);
    __syncwarp();
    const int row = m + warp_m + 16 * STRIPS * turn;
    if (packs) write_slab<ACTIVE, PACK>(out, size, slab, 16 * STRIPS, row, n + warp_n, lane);
    else write_slab<ACTIVE, 1>(out, size, slab, 16 * STRIPS, row, n + warp_n, lane);
  }
}
