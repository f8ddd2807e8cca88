// How the tiles of Hopper's matrix products end (product_sm90.cuh): a warpgroup's sums take their bias, activation and
// residual and leave as y, in storage type by TMA, in float32 by plain stores; or as they are, where k is in parts that
// a later launch joins. What is added is on its way before it is wanted: bias and shift are read before the products,
// the residual brought by TMA into the very place where y is then rounded to and stored from.
#pragma once
#include "sm90.cuh"

enum Activation { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3 };
// What an epilogue may meet: nothing; or a residual, and bias, bias and activation, bias and gates, or bias and shift.
enum Kind { PLAIN, LINEAR, ACTIVATED, GEGLU, IMAGE };

constexpr int STEP = 64; // k of a stage
constexpr int GROUPS = 2;

// y and the residual, and how an entry takes them.
#if defined(T_FLOAT32)
typedef T *Rows;
#define ROWS T *
#else
typedef TensorMap Rows;
#define ROWS const __grid_constant__ TensorMap
#endif

// Bytes of a row of a tile that is `width` elements wide: the widest swizzle that divides it.
constexpr int span_of(int width) { return width % 64 == 0 ? 128 : width % 32 == 0 ? 64 : 32; }

template <int M_, int N_, bool PINGPONG_> struct Tile {
  static constexpr int M = M_, N = N_;
  static constexpr bool PINGPONG = PINGPONG_;
  static constexpr int BLOCKS = PINGPONG ? M / 64 : M / 64 / GROUPS; // of 64 rows in a warpgroup
  static __device__ int first_block(int group) { return PINGPONG ? 0 : group * BLOCKS; }
  static constexpr int A_BYTES = M * STEP * 2, B_BYTES = N * STEP * 2, STAGE_BYTES = A_BYTES + B_BYTES;
};

struct Work {
  int m, n, slab, part, first, end; // first row and column; steps from `first` to `end`
};

// y[row, col] = activation(sum + bias[col] + shift[row / rows_per_shift, col]) + residual[row, col]; absent parts are null.
// The maps of y and residual are [slab][row][col] with boxes of 64 rows and span_of(the tile's columns) bytes. With
// `partial` the plain sums go there instead; its strides are in floats, and also those of float32's y and residual. GEGLU's
// gates use bias[columns + col]. With `more` each slab has a y of its own: slab i > 0 that of more[i - 1].
struct Output {
  const Rows &y, &residual;
  float *partial;
  const T *bias, *shift;
  int rows, columns, rows_per_shift, activation, has_residual, partial_row, partial_slab, partial_part;
  const TensorMap *more = nullptr;
};

struct Pair {
  float low, high;
};
DEVICE Pair unpack(uint32_t x) {
#if defined(T_BFLOAT16)
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
#else
  return {to_float(f16{uint16_t(x)}), to_float(f16{uint16_t(x >> 16)})};
#endif
}
#if defined(T_FLOAT32)
typedef Pair Packed;
DEVICE Pair unpack(Pair x) { return x; }
#else
typedef uint32_t Packed; // as a pair lies in memory
#endif
// Without a branch, so that a row of them runs on: zeros unless `at` is below `end`, and a store that then does nothing.
DEVICE Packed load_packed(const T *p, int at, int end) {
  Packed x;
#if defined(T_FLOAT32)
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %3, %4;\nmov.f32 %0, 0f00000000;\nmov.f32 %1, 0f00000000;\n@p ld.global.v2.f32 {%0, %1}, [%2];\n}"
               : "=f"(x.low), "=f"(x.high)
               : "l"(p + at), "r"(at), "r"(end));
#else
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %2, %3;\nmov.b32 %0, 0;\n@p ld.global.b32 %0, [%1];\n}" : "=r"(x) : "l"(p + at), "r"(at), "r"(end));
#endif
  return x;
}
DEVICE Pair load_pair(const T *p, int at, int end) { return unpack(load_packed(p, at, end)); }
DEVICE void store_pair(float *p, float low, float high, int at, int end) {
  asm volatile("{\n.reg .pred p;\nsetp.lt.s32 p, %3, %4;\n@p st.global.v2.f32 [%0], {%1, %2};\n}" ::"l"(p + at), "f"(low), "f"(high), "r"(at), "r"(end)
               : "memory");
}

// x times the normal distribution's Phi(z), by Abramowitz and Stegun 7.1.26 (error of Phi below 1e-7): no branch, so that a
// hundred of them in a row stay short.
DEVICE float times_cdf(float x, float z) {
  const float a = fabsf(z) * 0.70710678f, t = fast_reciprocal(1.f + 0.3275911f * a);
  const float p = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  const float tail = 0.5f * p * exp2_of(-1.44269504f * a * a); // Phi(-|z|)
  return x * (z < 0.f ? tail : 1.f - tail);
}

// The sums of a warpgroup's BLOCKS of 64 rows as y. With GEGLU the tile's right half are the gates of its left half.
template <class S, Kind KIND> struct Epilogue {
  static constexpr bool GATED = KIND == GEGLU;
  __device__ bool has_residual() const { return KIND != PLAIN && out.has_residual; }
  static constexpr int COLUMNS = GATED ? S::N / 2 : S::N;
  // Blocks and columns of them that leave together, from shared memory of BYTES to a warpgroup. A tall tile's blocks leave in turns, and
  // a wide one's halves, for the sake of its stages.
  static constexpr int TOGETHER = S::PINGPONG ? S::BLOCKS : 1, SIDES = COLUMNS > 160 ? 2 : 1, SIDE = COLUMNS / SIDES;
  static constexpr int ROUNDS = S::BLOCKS / TOGETHER * SIDES;
  static constexpr int SPAN = span_of(COLUMNS), BOX = SPAN / 2, BOXES = SIDE / BOX;
  static constexpr int BOX_BYTES = 64 * SPAN, BLOCK_BYTES = BOXES * BOX_BYTES;
  static constexpr int BYTES = sizeof(T) == 2 ? TOGETHER * BLOCK_BYTES : 0;
  // As many as fit beside them: of the 227 KB of a block, less the barriers, whose room ptxas rounds up to what `shared` is
  // aligned to, and the room to begin on a multiple of 1024.
  static constexpr int STAGES = (227 * 1024 - 1024 - 1024 - GROUPS * BYTES) / S::STAGE_BYTES;
  const Output &out;
  const uint32_t place, arrived; // where this warpgroup's y lies, and the barrier that its residual signals
  const int group, thread;

  // A thread's columns of the bias, and of the shift where all rows have the same, read before the products, so that nothing
  // waits for them. Float32's pairs take two registers, and it has no room for the shift's.
  static constexpr bool EARLY_SHIFT = KIND == IMAGE && sizeof(T) == 2;
  struct Early {
    Packed bias[KIND == PLAIN ? 1 : S::N / 8], shift[EARLY_SHIFT ? S::N / 8 : 1];
  };
  __device__ int column_of(const Work &work) const { return work.n + thread % 4 * 2; }
  // Eight columns lie inside C together or not at all: there are a multiple of eight of them.
  __device__ void load_columns(Packed (&pairs)[S::N / 8], const T *from, const Work &work) const {
    const int column = column_of(work);
#pragma unroll
    for (int j = 0; j < S::N / 8; j++)
      pairs[j] = load_packed(from + column + (j < COLUMNS / 8 ? 0 : out.columns), 8 * (j % (COLUMNS / 8)), out.columns - column);
  }
  __device__ void load_early(Early &early, const Work &work) const {
    if constexpr (KIND != PLAIN)
      if (out.bias != nullptr) load_columns(early.bias, out.bias, work);
    if constexpr (EARLY_SHIFT)
      if (has_one_shift(work)) load_columns(early.shift, out.shift + shift_row(work.m) * int64_t(out.columns), work);
  }
  __device__ int shift_row(int row) const { return row / out.rows_per_shift; }
  // Of a tile's rows; those past the last do not count.
  __device__ bool has_one_shift(const Work &work) const {
    return out.shift != nullptr && shift_row(work.m) == shift_row(min(work.m + S::M, out.rows) - 1);
  }

  // Changes the sums in place; `done` items came before.
  __device__ void write(float (&sums)[S::BLOCKS][S::N / 2], const Early &early, const Work &work, uint32_t done) const {
    const int lane = thread % 32, warp = thread / 32, row = work.m + 64 * S::first_block(group) + 16 * warp + lane / 4;
    const int column = column_of(work);
    if constexpr (!GATED) // which is never split
      if (out.partial != nullptr) return write_floats(sums, out.partial + work.part * int64_t(out.partial_part), work, row, column);
    if constexpr (KIND != PLAIN)
      if (out.bias != nullptr) add_columns(sums, early.bias);
    bool shifted = KIND != IMAGE || out.shift == nullptr;
    if constexpr (EARLY_SHIFT)
      if (!shifted && has_one_shift(work)) add_columns(sums, early.shift), shifted = true;
    if constexpr (KIND == IMAGE)
      if (!shifted) add_shift(sums, row, column);
    if constexpr (KIND == ACTIVATED || KIND == GEGLU) activate(sums);
#if defined(T_FLOAT32)
    if (has_residual()) {
      const T *residual = out.residual + work.slab * int64_t(out.partial_slab);
      add_rows(sums, row, column, [&](int r) { return residual + int64_t(r) * out.partial_row; });
    }
    write_floats(sums, out.y, work, row, column);
  }

  __device__ void prepare(const Work &) const {}
#else
#pragma unroll
    for (int round = 0; round < ROUNDS; round++) {
      if (round > 0) prepare(work, round);
      leave(sums, work, round, done * ROUNDS + round);
    }
    __syncwarp();
  }

  // body(address, row, column) for each box of a round.
  template <class F> __device__ void each_box(const Work &work, int round, F &&body) const {
#pragma unroll
    for (int i = 0; i < TOGETHER; i++)
#pragma unroll
      for (int j = 0; j < BOXES; j++)
        body(place + i * BLOCK_BYTES + j * BOX_BYTES, work.m + 64 * (S::first_block(group) + round / SIDES * TOGETHER + i),
             work.n + round % SIDES * SIDE + j * BOX);
  }

  // Before an item's products, or while the first of them run: once the last y has left, its place is filled with the residual, zeros
  // outside C.
  __device__ void prepare(const Work &work, int round = 0) const {
    if (thread == 0 && has_residual()) {
      stores_wait_read<0>();
      mbarrier_arrive_expect(arrived, BYTES);
      each_box(work, round, [&](uint32_t to, int row, int column) { load_box(to, out.residual, arrived, column, row, work.slab); });
    }
  }

  // A round's blocks, rounded to y's place, and from there by TMA; `before` rounds have been.
  __device__ void leave(float (&sums)[S::BLOCKS][S::N / 2], const Work &work, int round, uint32_t before) const {
    const int lane = thread % 32, warp = thread / 32;
    if (has_residual()) mbarrier_wait(arrived, before & 1);
    else {
      if (thread == 0) stores_wait_read<0>(); // the last y has left
      named_barrier(1 + group, WARPGROUP);
    }
    // Where 16 rows and columns of this warp lie, by their block of rows and their first column's eighth.
    const auto at = [&](int i, int j) {
      return place + i * BLOCK_BYTES + j * 16 / SPAN * BOX_BYTES + swizzled<SPAN>(16 * warp + lane % 16, j * 16 % SPAN / 16 + lane / 16);
    };
    // All of a block's residual is read before its sums are stored, as a read that follows a store waits for it.
#pragma unroll
    for (int i = 0; i < TOGETHER; i++) {
      float *block = sums[round / SIDES * TOGETHER + i] + round % SIDES * SIDE / 2;
      if (has_residual()) add_residual(block, [&](int j) { return at(i, j); });
#pragma unroll
      for (int j = 0; j < SIDE / 8; j += 2) {
        const float *value = block + 4 * j;
        uint32_t rounded[4];
#pragma unroll
        for (int e = 0; e < 4; e++) rounded[e] = round_pair(value[2 * e], value[2 * e + 1]);
        store_matrices(at(i, j), rounded);
      }
    }
    fence_async_proxy();
    named_barrier(1 + group, WARPGROUP);
    if (thread == 0) {
      const TensorMap &y = out.more != nullptr && work.slab > 0 ? out.more[work.slab - 1] : out.y;
      each_box(work, round, [&](uint32_t from, int row, int column) {
        if (row < out.rows && column < out.columns) store_box(y, from, column, row, out.more != nullptr ? 0 : work.slab);
      });
      stores_commit();
    }
  }

  template <class F> __device__ void add_residual(float *sums, F &&at) const {
    uint32_t more[SIDE / 16][4];
#pragma unroll
    for (int j = 0; j < SIDE / 16; j++) load_matrices(more[j], at(2 * j));
#pragma unroll
    for (int j = 0; j < SIDE / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Pair pair = unpack(more[j][e]);
        sums[8 * j + 2 * e] += pair.low, sums[8 * j + 2 * e + 1] += pair.high;
      }
  }
#endif

  __device__ void add_columns(float (&sums)[S::BLOCKS][S::N / 2], const Packed (&pairs)[S::N / 8]) const {
#pragma unroll
    for (int j = 0; j < S::N / 8; j++) {
      const Pair more = unpack(pairs[j]);
#pragma unroll
      for (int i = 0; i < S::BLOCKS; i++) {
        sums[i][4 * j] += more.low, sums[i][4 * j + 2] += more.low;
        sums[i][4 * j + 1] += more.high, sums[i][4 * j + 3] += more.high;
      }
    }
  }

  // Adds from(row)'s elements to each row.
  template <class F> __device__ void add_rows(float (&sums)[S::BLOCKS][S::N / 2], int row, int column, F &&from) const {
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = row + 64 * i + 8 * half;
        const T *more = from(r) + column;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) {
          const Pair pair = load_pair(more, 8 * j, r < out.rows ? out.columns - column : 0);
          sums[i][4 * j + 2 * half] += pair.low, sums[i][4 * j + 2 * half + 1] += pair.high;
        }
      }
  }
  __device__ void add_shift(float (&sums)[S::BLOCKS][S::N / 2], int row, int column) const {
    add_rows(sums, row, column, [&](int r) { return out.shift + shift_row(r) * int64_t(out.columns); });
  }

  // body(x, gate) for each sum.
  template <class F> __device__ void each_sum(float (&sums)[S::BLOCKS][S::N / 2], F &&body) const {
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
      for (int e = 0; e < COLUMNS / 2; e++) sums[i][e] = body(sums[i][e], sums[i][GATED ? e + COLUMNS / 2 : e]);
  }
  __device__ void activate(float (&sums)[S::BLOCKS][S::N / 2]) const {
    if constexpr (GATED) each_sum(sums, [](float x, float gate) { return times_cdf(x * gate, gate); });
    else if (out.activation == GELU) each_sum(sums, [](float x, float) { return times_cdf(x, x); });
    else if (out.activation != NONE) {
      const float scale = out.activation == SILU ? -1.44269504f : -1.702f * 1.44269504f; // exp(-x), exp(-1.702 x)
      each_sum(sums, [=](float x, float) { return x * fast_reciprocal(1.f + exp2_of(scale * x)); });
    }
  }

  __device__ void write_floats(const float (&sums)[S::BLOCKS][S::N / 2], float *first, const Work &work, int row, int column) const {
    float *to = first + work.slab * int64_t(out.partial_slab) + column;
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = row + 64 * i + 8 * half;
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++)
          store_pair(to + int64_t(r) * out.partial_row, sums[i][4 * j + 2 * half], sums[i][4 * j + 2 * half + 1], 8 * j,
                     r < out.rows ? out.columns - column : 0);
      }
  }
};
