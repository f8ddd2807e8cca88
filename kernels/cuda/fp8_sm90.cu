// Linear layers in 8-bit floats on Hopper: gemm_sm90.cu's products of A and B along k, in bytes of e4m3, so that a step is
// 128 k and the tensor cores take twice as many in the time. The sums are scaled back before the epilogue.
#include "product_sm90.cuh"

template <class S> struct Bytes {
  static constexpr int STEP_BYTES = 128;
  const TensorMap &a, &b;
  const float *a_scale, *b_scale;
  const int second; // rows from B's first half tile to its second
  int m, n, slab;
  typedef OperandTile<S::N, true> B;
  __device__ void prefetch_maps() const { prefetch_map(a), prefetch_map(b); }
  __device__ void begin(const Work &work) { m = work.m, n = work.n, slab = work.slab; }
  __device__ Place of_b(int step) const { return {n, step * STEP_BYTES, slab, second}; }
  __device__ void prefetch(int step, const Cluster &cluster) const { B::prefetch(cluster, b, of_b(step)); }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    load_box(to_a, a, barrier, step * STEP_BYTES, m, slab);
    B::load(cluster, to_b, b, barrier, of_b(step));
  }
  __device__ float scale() const { return *a_scale * *b_scale; }
};

#define GEMM_FP8(name, S, KIND) \
  KERNEL_SM90(fp8_sm90_##name)(PRODUCT, int activation, int second, const float *a_scale, const float *b_scale) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, activation); \
    product<S, true, true, KIND, true>(Bytes<S>{a, b, a_scale, b_scale, second}, out, PRODUCT_CUT); \
  }
GEMM_FP8(e4m3_256, Tile256, ACTIVATED)
GEMM_FP8(e4m3_160_pingpong, Tile160Pingpong, ACTIVATED)
GEMM_FP8(e4m3_geglu_256, Tile256, GEGLU)
GEMM_FP8(e4m3_geglu_160_pingpong, Tile160Pingpong, GEGLU)
