// The main loop of Hopper's matrix products: C[m, n] = A[m, k] B[k, n] with float32 sums, for gemm_sm90.cu and
// conv2d_sm90.cu. A block stays on its multiprocessor and takes items (a tile of C, a slab, a part of k) in turn. Its
// producer warp copies tiles of A and B by TMA into a ring of stages, a step of 64 k each; two warpgroups multiply them with
// wgmma. They share a tile, 64 rows each, or with PINGPONG take tiles in turns, so that one's epilogue hides behind the
// other's products. A warpgroup then begins when the other has seen its last stage arrive: a wait cannot tell a barrier's
// phase from the one two before, so no one may wait that far ahead.
// A residual is brought by TMA into the very place where y is then rounded to and stored from.
// Two blocks of a cluster may take tiles one below the other and share B's, the wider operand: what L2 gives is what holds
// large products back, and a tile of 256 columns then reads 256 rows of operands a step where it would read 384. Each block
// brings half of B's parts to both, so a stage is free when the consumers of both have done with it.
// What the stages read is the Source: prefetch() its maps, begin(work) once an item, load(step, stage, barrier, cluster) for each
// step.
// Float32 is multiplied as sums of two bfloat16 (Henry, Tang & Heinecke 2019): see Pass. Its y leaves by plain stores.
#pragma once
#include "sm90.cuh"

enum Activation { NONE = 0, SILU = 1, GELU = 2, QUICK_GELU = 3 };
// What an epilogue may meet: nothing; or a residual, and bias and activation, bias and gates, or bias and shift.
enum Kind { PLAIN, LINEAR, GEGLU, IMAGE };

constexpr int STEP = 64; // k of a stage
constexpr int GROUPS = 2;
constexpr uint16_t BOTH = 3; // blocks of a pair

// Whether an operand lies as two planes of bfloat16, hi = bf16(x) and lo = bf16(x - hi), as gemm_split (gemm.cu) has written
// them: its maps count twice as many slabs or images, the second half of them lo. k is then walked once for each product that
// counts, lo hi, hi lo and hi hi. The small ones come first, as tensor cores cut off what does not fit their sums.
constexpr bool SPLIT = sizeof(T) == 4;
constexpr int PASSES = SPLIT ? 3 : 1;

struct Pass {
  int step, a, b; // within it, and the planes that A and B are read from
};
// Of a step where each pass has `steps`.
DEVICE Pass pass_of(int step, int steps) {
  if constexpr (!SPLIT) return {step, 0, 0};
  const int pass = step / steps;
  return {step - pass * steps, pass == 0, pass == 1};
}

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

template <int N_, bool PINGPONG_, int STAGES_> struct Tile {
  static constexpr int M = 128, N = N_, STAGES = STAGES_;
  static constexpr bool PINGPONG = PINGPONG_;
  static constexpr int BLOCKS = PINGPONG ? 2 : 1; // of 64 rows in a warpgroup
  static constexpr int A_BYTES = M * STEP * 2, B_BYTES = N * STEP * 2, STAGE_BYTES = A_BYTES + B_BYTES;
};

// A box of B, which is part number `part` of its tile: the blocks of a pair bring every other one, to both.
DEVICE void load_part(const Cluster &cluster, int part, uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y, int z) {
  if (cluster.blocks == 1) load_box(to, map, barrier, x, y, z);
  else if (part % 2 == cluster.rank) load_box_to(BOTH, to, map, barrier, x, y, z);
}

// ---- operands in shared memory: descriptors of 64 rows of A, of all of B

// A tile of WIDTH m or n. ALONG: [WIDTH][64 k], else chunks of [64 k][span].
template <int WIDTH, bool ALONG> struct OperandTile {
  static constexpr int SPAN = ALONG ? 128 : span_of(WIDTH);
  static constexpr int CHUNK_BYTES = STEP * SPAN, CHUNK = SPAN / 2, CHUNKS = WIDTH / CHUNK; // where not ALONG
  static constexpr int BYTES_64 = 64 * STEP * 2;                                           // of 64 m
  static constexpr int K16 = ALONG ? 32 : 16 * SPAN;
  static __device__ uint64_t describe(uint32_t tile) {
    return ALONG ? descriptor_along(tile) : descriptor_across<SPAN>(tile, CHUNK_BYTES);
  }
  // Brings A's tile from a map [slab][m][k], box [1][WIDTH][64], or [slab][k][m], box [1][64][CHUNK].
  static __device__ void load(uint32_t to, const TensorMap &map, uint32_t barrier, int place, int k, int slab) {
    if constexpr (ALONG) load_box(to, map, barrier, k, place, slab);
    else
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) load_box(to + i * CHUNK_BYTES, map, barrier, place + i * CHUNK, k, slab);
  }
  // B's, with n for m; along k in two boxes of half the rows, `second` rows apart.
  static __device__ void load(const Cluster &cluster, uint32_t to, const TensorMap &map, uint32_t barrier, int place, int k, int slab,
                              int second = WIDTH / 2) {
    if constexpr (ALONG) {
      load_part(cluster, 0, to, map, barrier, k, place, slab);
      load_part(cluster, 1, to + WIDTH / 2 * SPAN, map, barrier, k, place + second, slab);
    } else
#pragma unroll
      for (int i = 0; i < CHUNKS; i++) load_part(cluster, i, to + i * CHUNK_BYTES, map, barrier, place + i * CHUNK, k, slab);
  }
};

// ---- items

// How C is cut: tiles down and across, slabs (batches, or taps of a weight's gradient), and k into parts of `part_steps`.
struct Cut {
  int down, across, slabs, items, steps, part_steps;
};

struct Work {
  int m, n, slab, part, first, end; // first row and column; steps from `first` to `end`
};

// Neighbours in order share a band of tiles, so that what they read stays in L2. With an even number of tiles down, items
// 2i and 2i + 1 are one below the other: a pair's, of which the last may lie outside C.
template <class S, int COLUMNS> DEVICE Work work_of(int item, const Cut &cut) {
  constexpr int BAND = 8;
  const int tiles = cut.down * cut.across, tile = item % tiles, layer = item / tiles;
  const int band = tile / (BAND * cut.across), inside = tile % (BAND * cut.across), height = min(BAND, cut.down - band * BAND);
  const int part = layer / cut.slabs, first = part * cut.part_steps;
  return {(band * BAND + inside % height) * S::M, inside / height * COLUMNS, layer % cut.slabs, part,
          first, min(cut.steps, first + cut.part_steps)};
}

// ---- epilogue

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

DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
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
  static constexpr int SPAN = span_of(COLUMNS), BOX = SPAN / 2, BOXES = COLUMNS / BOX;
  static constexpr int BOX_BYTES = 64 * SPAN, BLOCK_BYTES = BOXES * BOX_BYTES, BYTES = S::BLOCKS * BLOCK_BYTES;
  const Output &out;
  const uint32_t place, arrived; // where this warpgroup's y lies, and the barrier that its residual signals
  const int group, thread;

  // A thread's columns of the bias, read before the products, so that nothing waits for it.
  struct Bias {
    Packed pairs[KIND == PLAIN ? 1 : S::N / 8];
  };
  __device__ int column_of(const Work &work) const { return work.n + thread % 4 * 2; }
  // Eight columns lie inside C together or not at all: there are a multiple of eight of them.
  __device__ void load_bias(Bias &bias, const Work &work) const {
    const int column = column_of(work);
    if constexpr (KIND != PLAIN)
      if (out.bias != nullptr)
#pragma unroll
        for (int j = 0; j < S::N / 8; j++) {
          const T *from = out.bias + column + (j < COLUMNS / 8 ? 0 : out.columns);
          bias.pairs[j] = load_packed(from, 8 * (j % (COLUMNS / 8)), out.columns - column);
        }
  }

  // Changes the sums in place.
  __device__ void write(float (&sums)[S::BLOCKS][S::N / 2], const Bias &bias, const Work &work, uint32_t parity) const {
    const int lane = thread % 32, warp = thread / 32, row = work.m + 64 * (S::PINGPONG ? 0 : group) + 16 * warp + lane / 4;
    const int column = column_of(work);
    if constexpr (!GATED) // which is never split
      if (out.partial != nullptr) return write_floats(sums, out.partial + work.part * int64_t(out.partial_part), work, row, column);
    if constexpr (KIND != PLAIN)
      if (out.bias != nullptr) add_bias(sums, bias);
    if constexpr (KIND == IMAGE)
      if (out.shift != nullptr) add_shift(sums, row, column);
    if constexpr (KIND == LINEAR || KIND == GEGLU) activate(sums);
#if defined(T_FLOAT32)
    if (has_residual()) {
      const T *residual = out.residual + work.slab * int64_t(out.partial_slab);
      add_rows(sums, row, column, [&](int r) { return residual + int64_t(r) * out.partial_row; });
    }
    write_floats(sums, out.y, work, row, column);
  }

  __device__ void prepare(const Work &) const {}
#else
    leave(sums, work, parity);
  }

  // body(address, row, column) for each box.
  template <class F> __device__ void each_box(const Work &work, F &&body) const {
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
      for (int j = 0; j < BOXES; j++)
        body(place + i * BLOCK_BYTES + j * BOX_BYTES, work.m + 64 * (S::PINGPONG ? i : group), work.n + j * BOX);
  }

  // Before the products of an item: once the last y has left, its place is filled with the residual, zeros outside C.
  __device__ void prepare(const Work &work) const {
    if (thread == 0) {
      stores_wait_read<0>();
      if (has_residual()) {
        mbarrier_arrive_expect(arrived, BYTES);
        each_box(work, [&](uint32_t to, int row, int column) { load_box(to, out.residual, arrived, column, row, work.slab); });
      }
    }
    __syncwarp();
  }

  // Rounded to y's place, and from there by TMA.
  __device__ void leave(float (&sums)[S::BLOCKS][S::N / 2], const Work &work, uint32_t parity) const {
    const int lane = thread % 32, warp = thread / 32;
    if (has_residual()) mbarrier_wait(arrived, parity);
    else named_barrier(1 + group, WARPGROUP); // the last y has left
    // Where 16 rows and columns of this warp lie, by their block of rows and their first column's eighth.
    const auto at = [&](int i, int j) {
      return place + i * BLOCK_BYTES + j * 16 / SPAN * BOX_BYTES + swizzled<SPAN>(16 * warp + lane % 16, j * 16 % SPAN / 16 + lane / 16);
    };
    // All of a block's residual is read before its sums are stored, as a read that follows a store waits for it.
#pragma unroll
    for (int i = 0; i < S::BLOCKS; i++) {
      if (has_residual()) add_residual(sums[i], [&](int j) { return at(i, j); });
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j += 2) {
        const float *value = sums[i] + 4 * j;
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
      each_box(work, [&](uint32_t from, int row, int column) {
        if (row < out.rows && column < out.columns) store_box(y, from, column, row, out.more != nullptr ? 0 : work.slab);
      });
      stores_commit();
    }
    __syncwarp();
  }

  template <class F> __device__ void add_residual(float (&sums)[S::N / 2], F &&at) const {
    uint32_t more[COLUMNS / 16][4];
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++) load_matrices(more[j], at(2 * j));
#pragma unroll
    for (int j = 0; j < COLUMNS / 16; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const Pair pair = unpack(more[j][e]);
        sums[8 * j + 2 * e] += pair.low, sums[8 * j + 2 * e + 1] += pair.high;
      }
  }
#endif

  __device__ void add_bias(float (&sums)[S::BLOCKS][S::N / 2], const Bias &bias) const {
#pragma unroll
    for (int j = 0; j < S::N / 8; j++) {
      const Pair more = unpack(bias.pairs[j]);
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
    add_rows(sums, row, column, [&](int r) { return out.shift + r / out.rows_per_shift * int64_t(out.columns); });
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

// ---- the product

extern __shared__ __align__(1024) uint8_t shared[];

// FP8: the operands are bytes, 128 k to a row as 64 halves are, and source.scale() brings the sums back.
template <class S, bool A_ALONG, bool B_ALONG, Kind KIND, bool FP8 = false, class Source>
DEVICE void product(Source source, const Output &out, const Cut &cut) {
  typedef Epilogue<S, KIND> Finish;
  typedef OperandTile<S::M, A_ALONG> A;
  typedef OperandTile<S::N, B_ALONG> B;
  __shared__ __align__(8) uint64_t barriers[2 * S::STAGES + 2 * GROUPS];
  const uint32_t full = shared_address(barriers), empty = full + 8 * S::STAGES;
  const uint32_t arrived = empty + 8 * S::STAGES, turns = arrived + 8 * GROUPS; // of a warpgroup's residual, and its turn
  const uint32_t stages = (shared_address(shared) + 1023) & ~1023u;
  const Cluster cluster;
  launch_dependents();
  if (threadIdx.x == 32) source.prefetch();
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::STAGES; i++) {
      mbarrier_init(full + 8 * i, 1);
      mbarrier_init(empty + 8 * i, 4 * (S::PINGPONG ? 1 : GROUPS) * cluster.blocks); // a lane of each warp that reads
    }
    for (int i = 0; i < GROUPS; i++) {
      if (KIND != PLAIN && !SPLIT) mbarrier_init(arrived + 8 * i, 1);
      if (S::PINGPONG) mbarrier_init(turns + 8 * i, 4);
    }
    fence_mbarrier_init();
  }
  if (cluster.blocks > 1) cluster.sync();
  else __syncthreads();
  wait_for_prerequisites();
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<40>();
    if (threadIdx.x < 32 && elect_one()) {
      Ring<S::STAGES> ring;
      for (int item = blockIdx.x; item < cut.items; item += gridDim.x) {
        const Work work = work_of<S, Finish::COLUMNS>(item, cut);
        source.begin(work);
#pragma unroll 1
        for (int step = work.first; step < work.end; step++, ring.next()) {
          const uint32_t stage = stages + ring.stage * S::STAGE_BYTES, barrier = full + 8 * ring.stage;
          mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
          mbarrier_arrive_expect(barrier, S::STAGE_BYTES);
          source.load(step, stage, stage + S::A_BYTES, barrier, cluster);
        }
      }
    }
  } else {
    registers_grow_to<232>();
    const int group = threadIdx.x / WARPGROUP - 1, thread = threadIdx.x % WARPGROUP;
    const Finish finish = {out, stages + S::STAGES * S::STAGE_BYTES + group * Finish::BYTES, arrived + 8 * group, group, thread};
    Ring<S::STAGES> ring;
    uint32_t done = 0; // items
    float sums[S::BLOCKS][S::N / 2];
    for (int item = blockIdx.x, turn = 0; item < cut.items; item += gridDim.x, turn ^= 1) {
      const Work work = work_of<S, Finish::COLUMNS>(item, cut);
      if (S::PINGPONG && turn != group) {
        ring.skip(work.end - work.first);
        continue;
      }
      finish.prepare(work);
      typename Finish::Bias bias = {};
      finish.load_bias(bias, work);
      if constexpr (S::PINGPONG) mbarrier_wait(turns + 8 * group, (done ^ group ^ 1) & 1); // the first turn is group 0's
      uint32_t last = 0; // the barrier of the stage before, free when its products are done
#pragma unroll 1
      for (int step = work.first; step < work.end; step++, ring.next()) {
        const uint32_t a = stages + ring.stage * S::STAGE_BYTES + (S::PINGPONG ? 0 : group * A::BYTES_64);
        const uint64_t a_tile = A::describe(a), b_tile = B::describe(stages + ring.stage * S::STAGE_BYTES + S::A_BYTES);
        mbarrier_wait(full + 8 * ring.stage, ring.parity);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < STEP / 16; q++)
#pragma unroll
          for (int i = 0; i < S::BLOCKS; i++) {
            const uint64_t left = advance(a_tile, q * A::K16 + i * A::BYTES_64), right = advance(b_tile, q * B::K16);
            const bool accumulate = step > work.first || q > 0;
            if constexpr (FP8) wgmma_fp8(sums[i], left, right, accumulate);
            else wgmma<!A_ALONG, !B_ALONG>(sums[i], left, right, accumulate);
          }
        wgmma_commit();
        wgmma_wait<1>();
        if (step > work.first && thread % 32 < cluster.blocks) mbarrier_arrive_at(last, thread % 32);
        last = empty + 8 * ring.stage;
      }
      if (S::PINGPONG && thread % 32 == 0) mbarrier_arrive(turns + 8 * (group ^ 1));
      wgmma_wait<0>();
      if (thread % 32 < cluster.blocks) mbarrier_arrive_at(last, thread % 32);
      __syncwarp();
      if constexpr (FP8) {
        const float scale = source.scale();
#pragma unroll
        for (int i = 0; i < S::BLOCKS; i++)
#pragma unroll
          for (int e = 0; e < S::N / 2; e++) sums[i][e] *= scale;
      }
      finish.write(sums, bias, work, done++ & 1);
    }
    if (thread == 0) stores_wait_read<0>();
  }
  if (cluster.blocks > 1) cluster.sync(); // the other's last arrivals come here
}

// ---- entries

typedef Tile<256, false, 3> Tile256;
typedef Tile<160, false, 5> Tile160;
typedef Tile<160, true, 4> Tile160Pingpong;
typedef Tile<128, true, 5> Tile128Pingpong;
typedef Tile<80, false, 7> Tile80;

// What every entry takes before its own parameters (engine/cuda/plan_sm90.ts), and what product() makes of it.
#define PRODUCT \
  const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, ROWS y, ROWS residual, float *partial, const T *bias, int rows, \
      int columns, int has_residual, int partial_row, int partial_slab, int partial_part, int down, int across, int slabs, int items, \
      int steps, int part_steps
#define PRODUCT_OUTPUT(shift, rows_per_shift, activation) \
  {y, residual, partial, bias, shift, rows, columns, rows_per_shift, activation, has_residual, partial_row, partial_slab, partial_part}
#define PRODUCT_CUT Cut{down, across, slabs, items, steps, part_steps}
