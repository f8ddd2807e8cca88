// conv2d on Hopper, channels last, forward: y's pixels are walked over x.
#include "conv2d_sm90.cuh"

// Forward. The last channels may be those of a second image, `skip`: a range of k of its own behind the `own` channels of the
// first, which end in the middle of a step of the weight where they are not whole steps; the image has zeros there.
// Float32's weight is a map [taps of hi, taps of lo][o][c].
template <class S> struct Pixels {
  const TensorMap &image, &skip, &weight;
  const Grid grid;
  const int taps, taps_across, channel_steps, skip_steps, own, images;
  int n;
  Pixel first;
  Tap at; // with SPLIT each pass goes on counting taps
  typedef OperandTile<S::N, true> B;
  __device__ int steps() const { return channel_steps + skip_steps; }
  __device__ bool of_skip() const { return at.inside >= channel_steps; }
  __device__ int channel() const { return (of_skip() ? at.inside - channel_steps : at.inside) * STEP; }
  __device__ Place of_b() const {
    return {n, of_skip() ? own + channel() : channel(), SPLIT && at.tap >= 2 * taps ? at.tap - 2 * taps : at.tap, S::N / 2};
  }
  __device__ void next() {
    at.next(steps(), taps_across);
    if (SPLIT && (at.tap == taps || at.tap == 2 * taps)) at.right = at.down = 0;
  }
  __device__ void prefetch_maps() const { prefetch_map(image), prefetch_map(weight); }
  __device__ void begin(const Work &work) {
    n = work.n;
    first = Pixel(work.m, grid);
    const int before = SPLIT ? work.first / (taps * steps()) * taps : 0;
    at = Tap(work.first - before * steps(), steps(), taps_across);
    at.tap += before;
  }
  __device__ void prefetch(int, const Cluster &cluster) { B::prefetch(cluster, weight, of_b()), next(); }
  __device__ void load(int, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) {
    load_grid(to_a, of_skip() ? skip : image, barrier, channel(), first, grid, at.right, at.down, 0, SPLIT && at.tap < taps ? images : 0);
    B::load(cluster, to_b, weight, barrier, of_b());
    next();
  }
};

#define FORWARD(name, S) \
  KERNEL_SM90(conv2d_sm90_##name)(PRODUCT, const T *shift, int rows_per_shift, GRID, const __grid_constant__ TensorMap skip, \
                                  int skip_steps, int own) { \
    const Output out = PRODUCT_OUTPUT(shift, rows_per_shift, NONE); \
    product<S, true, true, IMAGE>(Pixels<S>{a, skip, b, GRID_OF, taps, taps_across, channel_steps, skip_steps, own, rows / (width * height)}, out, \
                                     PRODUCT_CUT); \
  }

#if defined(T_FLOAT32)
FORWARD(split_forward_256, Tile256)
FORWARD(split_forward_128_pingpong, Tile128Pingpong)
#else
FORWARD(forward_256, Tile256)
FORWARD(forward_160, Tile160)
FORWARD(forward_160_pingpong, Tile160Pingpong)
FORWARD(forward_160_tall, Tile160Tall)
FORWARD(forward_128_pingpong, Tile128Pingpong)
#endif
