// The products of linear layers and matmul on Hopper, in each pairing of layouts as in gemm.cu; linear + activation,
// for the few rows of text encoders, in few tiles, as activations are most of a kernel's text and of the time a driver
// compiles it; linear + GEGLU, whose tile of B is half values and half gates: rows n of the weight and rows half + n,
// by two boxes; and up to three linear layers of one x, as attention has them, whose waves of tiles fill the GPU where
// those of one leave a part of it idle. Chosen by engine/cuda/plan_sm90.ts, which also makes the maps:
// [slab][rows][columns] of A, B, y and the residual.
#include "product_sm90.cuh"

template <class S, bool A_ALONG, bool B_ALONG> struct Matrices {
  const TensorMap &a, &b;
  const int second; // rows from B's first half tile to its second, where B lies along k
  const int steps, slabs; // of a pass, of a plane
  int m, n, slab;
  typedef OperandTile<S::N, B_ALONG> B;
  __device__ void prefetch_maps() const { prefetch_map(a), prefetch_map(b); }
  __device__ void begin(const Work &work) { m = work.m, n = work.n, slab = work.slab; }
  __device__ Place of_b(const Pass &pass) const { return {n, pass.step * STEP, slab + pass.b * slabs, second}; }
  __device__ void prefetch(int step, const Cluster &cluster) const { B::prefetch(cluster, b, of_b(pass_of(step, steps))); }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    const Pass pass = pass_of(step, steps);
    OperandTile<S::M, A_ALONG>::load(to_a, a, barrier, m, pass.step * STEP, slab + pass.a * slabs);
    B::load(cluster, to_b, b, barrier, of_b(pass));
  }
};

#define GEMM(name, S, A_ALONG, B_ALONG, KIND) \
  KERNEL_SM90(gemm_sm90_##name)(PRODUCT, int activation, int second) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, activation); \
    product<S, A_ALONG, B_ALONG, KIND>(Matrices<S, A_ALONG, B_ALONG>{a, b, second, steps / PASSES, slabs}, out, PRODUCT_CUT); \
  }

// Slab i is y_i = x W_i^T, W_i and y_i in tensors of their own.
struct MoreMaps {
  TensorMap weight[2], y[2];
};
template <class S> struct Projections {
  const TensorMap &a, &b;
  const MoreMaps &more;
  int m, n, slab;
  typedef OperandTile<S::N, true> B;
  __device__ void prefetch_maps() const { prefetch_map(a), prefetch_map(b); }
  __device__ void begin(const Work &work) { m = work.m, n = work.n, slab = work.slab; }
  __device__ const TensorMap &weight() const { return slab > 0 ? more.weight[slab - 1] : b; }
  __device__ Place of_b(int step) const { return {n, step * STEP, 0, S::N / 2}; }
  __device__ void prefetch(int step, const Cluster &cluster) const { B::prefetch(cluster, weight(), of_b(step)); }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    OperandTile<S::M, true>::load(to_a, a, barrier, m, step * STEP, 0);
    B::load(cluster, to_b, weight(), barrier, of_b(step));
  }
};

#define PROJECTIONS(tile, S) \
  KERNEL_SM90(gemm_sm90_projections_##tile)(PRODUCT, const __grid_constant__ MoreMaps more) { \
    Output out = PRODUCT_OUTPUT(nullptr, 1, NONE); \
    out.more = more.y; \
    product<S, true, true, PLAIN>(Projections<S>{a, b, more}, out, PRODUCT_CUT); \
  }

#define LAYOUTS(tile, S) \
  GEMM(nt_##tile, S, true, true, LINEAR) \
  GEMM(nn_##tile, S, true, false, PLAIN) \
  GEMM(tn_##tile, S, false, false, PLAIN)
#if defined(T_FLOAT32)
// Epilogues are left to gemm_join.
GEMM(split_nt_256, Tile256, true, true, PLAIN)
GEMM(split_nt_128_pingpong, Tile128Pingpong, true, true, PLAIN)
GEMM(split_nn_256, Tile256, true, false, PLAIN)
#else
LAYOUTS(256, Tile256)
LAYOUTS(160, Tile160)
LAYOUTS(160_pingpong, Tile160Pingpong)
LAYOUTS(80, Tile80)
GEMM(activated_160, Tile160, true, true, ACTIVATED)
GEMM(activated_80, Tile80, true, true, ACTIVATED)
GEMM(nt_160_tall, Tile160Tall, true, true, LINEAR)
GEMM(nn_160_tall, Tile160Tall, true, false, PLAIN)
GEMM(geglu_256, Tile256, true, true, GEGLU)
GEMM(geglu_160_pingpong, Tile160Pingpong, true, true, GEGLU)
PROJECTIONS(256, Tile256)
PROJECTIONS(160, Tile160)
PROJECTIONS(160_pingpong, Tile160Pingpong)
#endif
