// The products of linear layers and matmul on Hopper, in each pairing of layouts as in gemm.cu, and linear + GEGLU, whose
// tile of B is half values and half gates: rows n of the weight and rows half + n, by two boxes. Chosen by
// engine/cuda/plan_sm90.ts, which also makes the maps: [slab][rows][columns] of A, B, y and the residual.
#include "product_sm90.cuh"

template <class S, bool A_ALONG, bool B_ALONG> struct Matrices {
  const TensorMap &a, &b;
  const int second; // rows from B's first half tile to its second, where B lies along k
  int m, n, slab;
  __device__ void begin(const Work &work) { m = work.m, n = work.n, slab = work.slab; }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier) const {
    OperandTile<S::M, A_ALONG>::load(to_a, a, barrier, m, step * STEP, slab);
    if constexpr (B_ALONG) {
      load_box(to_b, b, barrier, step * STEP, n, slab);
      load_box(to_b + S::B_BYTES / 2, b, barrier, step * STEP, n + second, slab);
    } else OperandTile<S::N, false>::load(to_b, b, barrier, n, step * STEP, slab);
  }
};

#define GEMM(name, S, A_ALONG, B_ALONG, KIND) \
  KERNEL_SM90(gemm_sm90_##name)(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, \
                                const __grid_constant__ TensorMap y, const __grid_constant__ TensorMap residual, float *partial, \
                                const T *bias, int rows, int columns, int activation, \
                                int has_residual, int partial_row, int partial_slab, int partial_part, int second, int down, int across, \
                                int slabs, int items, int steps, int part_steps) { \
    const Output out = {y, residual, partial, bias, nullptr, rows, columns, 1, activation, has_residual, partial_row, partial_slab, partial_part}; \
    product<S, A_ALONG, B_ALONG, KIND>(Matrices<S, A_ALONG, B_ALONG>{a, b, second}, out, Cut{down, across, slabs, items, steps, part_steps}); \
  }

typedef Tile<256, false, 3> Wide;
typedef Tile<160, false, 5> Even;
typedef Tile<160, true, 4> EvenPingpong;
typedef Tile<80, false, 7> Narrow;

#define LAYOUTS(tile, S) \
  GEMM(nt_##tile, S, true, true, LINEAR) \
  GEMM(nn_##tile, S, true, false, PLAIN) \
  GEMM(tn_##tile, S, false, false, PLAIN)
LAYOUTS(256, Wide)
LAYOUTS(160, Even)
LAYOUTS(160_pingpong, EvenPingpong)
LAYOUTS(80, Narrow)
GEMM(geglu_256, Wide, true, true, GEGLU)
GEMM(geglu_160_pingpong, EvenPingpong, true, true, GEGLU)
