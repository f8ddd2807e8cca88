// conv2d on Hopper, channels last, forward: y's pixels are walked over x.
#include "conv2d_sm90.cuh"

// Forward. The last channels may be those of a second image, `skip`: a range of k of its own behind the `own` channels of the
// first, which end in the middle of a step of the weight where they are not whole steps; the image has zeros there.
// Float32's weight is a map [taps of hi, taps of lo][o][c].
template <class S> struct Pixels {
  const TensorMap &image, &skip, &weight;
  const Grid grid;
  const int taps, taps_across, channel_steps, skip_steps, own, images;
  int m, n;
  typedef OperandTile<S::N, true> B;
  struct Read {
    int tap, channel, image;
    bool second; // of the second image
    Place b;
  };
  __device__ Read of(int step) const {
    const int steps = channel_steps + skip_steps;
    const Pass pass = pass_of(step, taps * steps);
    const int tap = pass.step / steps, inside = pass.step - tap * steps;
    const bool second = inside >= channel_steps;
    const int channel = (second ? inside - channel_steps : inside) * STEP;
    return {tap, channel, pass.a * images, second, {n, second ? own + channel : channel, tap + pass.b * taps, S::N / 2}};
  }
  __device__ void prefetch_maps() const { prefetch_map(image), prefetch_map(weight); }
  __device__ void begin(const Work &work) { m = work.m, n = work.n; }
  __device__ void prefetch(int step, const Cluster &cluster) const { B::prefetch(cluster, weight, of(step).b); }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    const Read at = of(step);
    load_grid(to_a, at.second ? skip : image, barrier, at.channel, m, grid, at.tap % taps_across, at.tap / taps_across, 0, at.image);
    B::load(cluster, to_b, weight, barrier, at.b);
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
