// The gradients of conv2d on Hopper, channels last. That of x (stride 1) walks x's pixels over dy with the taps turned round; that
// of the weight has the pixels along k and a tap as its slab.
#include "conv2d_sm90.cuh"

// The gradient of x.
template <class S> struct TurnedPixels {
  const TensorMap &dy, &weight;
  const Grid grid;
  const int taps_across, taps_down, channel_steps;
  int n;
  Pixel first;
  Tap at;
  typedef OperandTile<S::N, false> B;
  __device__ Place of_b() const { return {n, at.inside * STEP, at.tap, 0}; }
  __device__ void next() { at.next(channel_steps, taps_across); }
  __device__ void prefetch_maps() const { prefetch_map(dy), prefetch_map(weight); }
  __device__ void begin(const Work &work) {
    n = work.n;
    first = Pixel(work.m, grid);
    at = Tap(work.first, channel_steps, taps_across);
  }
  __device__ void prefetch(int, const Cluster &cluster) { B::prefetch(cluster, weight, of_b()), next(); }
  __device__ void load(int, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) {
    load_grid(to_a, dy, barrier, at.inside * STEP, first, grid, taps_across - 1 - at.right, taps_down - 1 - at.down);
    B::load(cluster, to_b, weight, barrier, of_b());
    next();
  }
};

template <class S> struct WeightGradient {
  typedef OperandTile<S::N, false> B;
  const TensorMap &dy, &image;
  const Grid grid;
  const int taps_across;
  int m, n, right, down;
  Pixel at;
  __device__ void prefetch_maps() const { prefetch_map(dy), prefetch_map(image); }
  __device__ void prefetch(int, const Cluster &) const {} // pixels
  __device__ void begin(const Work &work) {
    m = work.m, n = work.n, down = work.slab / taps_across, right = work.slab - down * taps_across;
    at = Pixel(work.first * STEP, grid);
  }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) {
    OperandTile<S::M, false>::load(to_a, dy, barrier, m, step * STEP, 0);
#pragma unroll
    for (int i = 0; i < B::CHUNKS; i++)
      if (cluster.blocks == 1 || i % 2 == cluster.rank)
        load_grid(to_b + i * B::CHUNK_BYTES, image, barrier, n + i * B::CHUNK, at, grid, right, down, cluster.blocks == 1 ? 0 : BOTH);
    at.move(STEP, grid);
  }
};

#define BACKWARD_X(tile, S) \
  KERNEL_SM90(conv2d_backward_sm90_backward_x_##tile)(PRODUCT, GRID) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, NONE); \
    product<S, true, false, PLAIN>(TurnedPixels<S>{a, b, GRID_OF, taps_across, taps / taps_across, channel_steps}, out, PRODUCT_CUT); \
  }
#define BACKWARD_WEIGHT(tile, S) \
  KERNEL_SM90(conv2d_backward_sm90_backward_weight_##tile)(PRODUCT, GRID) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, NONE); \
    product<S, false, false, PLAIN>(WeightGradient<S>{a, b, GRID_OF, taps_across}, out, PRODUCT_CUT); \
  }

BACKWARD_X(256, Tile256)
BACKWARD_X(160, Tile160)
BACKWARD_X(160_tall, Tile160Tall)
BACKWARD_X(128_pingpong, Tile128Pingpong)
BACKWARD_WEIGHT(256, Tile256)
BACKWARD_WEIGHT(160, Tile160)
BACKWARD_WEIGHT(128_pingpong, Tile128Pingpong)
