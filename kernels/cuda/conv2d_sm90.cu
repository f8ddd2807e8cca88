// conv2d on Hopper, channels last, as matrix products whose image operand TMA gathers: a tile's rows are pixels of
// a walked grid, each read at the offset of a tap, with zeros outside the image. Pixels that are whole rows of the grid, or a part of
// one, are a box of the image; TMA's im2col, which walks any grid, takes some 8 cycles a pixel by an H200's times, thrice what boxes do.
// k runs over taps x channels, each tap's channels padded with zeros to whole steps. The weight [o, taps, c] is a map [taps][o][c] in all three products.
// Forward walks y's pixels over x; the gradient of x (stride 1) walks x's pixels over dy with the taps turned round; the
// gradient of the weight has the pixels along k and a tap as its slab.
#include "product_sm90.cuh"

// Pixel (x, y) of a grid of width x height stands at (x * stride + left, y * stride + top) of the image. Boxed: its map is tiled, in
// boxes of as many pixels as are loaded.
struct Grid {
  int width, height, stride, left, top, boxed;
};

// Pixels from number `p` of the grid on, at the offset of a tap; to this block, or to those of a cluster. The grid begins at
// image `first` of the map.
DEVICE void load_grid(uint32_t to, const TensorMap &map, uint32_t barrier, int channel, int p, const Grid &g, int right, int down, uint16_t blocks = 0,
                      int first = 0) {
  const int row = p / g.width, image = row / g.height, x = (p - row * g.width) * g.stride + g.left, y = (row - image * g.height) * g.stride + g.top;
  if (g.boxed && blocks) load_box_to(blocks, to, map, barrier, channel, x + right, y + down, first + image);
  else if (g.boxed) load_box(to, map, barrier, channel, x + right, y + down, first + image);
  else if (blocks) load_pixels_to(blocks, to, map, barrier, channel, x, y, first + image, right, down);
  else load_pixels(to, map, barrier, channel, x, y, first + image, right, down);
}

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

// The gradient of x.
template <class S> struct TurnedPixels {
  const TensorMap &dy, &weight;
  const Grid grid;
  const int taps, taps_across, channel_steps;
  int m, n;
  typedef OperandTile<S::N, false> B;
  __device__ Place of_b(int step) const { return {n, step % channel_steps * STEP, step / channel_steps, 0}; }
  __device__ void prefetch_maps() const { prefetch_map(dy), prefetch_map(weight); }
  __device__ void begin(const Work &work) { m = work.m, n = work.n; }
  __device__ void prefetch(int step, const Cluster &cluster) const { B::prefetch(cluster, weight, of_b(step)); }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    const Place at = of_b(step);
    const int seen = taps - 1 - at.slab;
    load_grid(to_a, dy, barrier, at.k, m, grid, seen % taps_across, seen / taps_across);
    B::load(cluster, to_b, weight, barrier, at);
  }
};

template <class S> struct WeightGradient {
  typedef OperandTile<S::N, false> B;
  const TensorMap &dy, &image;
  const Grid grid;
  const int taps_across;
  int m, n, tap;
  __device__ void prefetch_maps() const { prefetch_map(dy), prefetch_map(image); }
  __device__ void prefetch(int, const Cluster &) const {} // pixels
  __device__ void begin(const Work &work) { m = work.m, n = work.n, tap = work.slab; }
  __device__ void load(int step, uint32_t to_a, uint32_t to_b, uint32_t barrier, const Cluster &cluster) const {
    OperandTile<S::M, false>::load(to_a, dy, barrier, m, step * STEP, 0);
#pragma unroll
    for (int i = 0; i < B::CHUNKS; i++)
      if (cluster.blocks == 1 || i % 2 == cluster.rank)
        load_grid(to_b + i * B::CHUNK_BYTES, image, barrier, n + i * B::CHUNK, step * STEP, grid, tap % taps_across, tap / taps_across,
                  cluster.blocks == 1 ? 0 : BOTH);
  }
};

#define GRID int width, int height, int stride, int left, int top, int boxed, int taps, int taps_across, int channel_steps
#define GRID_OF Grid{width, height, stride, left, top, boxed}

#define FORWARD(name, S) \
  KERNEL_SM90(conv2d_sm90_##name)(PRODUCT, const T *shift, int rows_per_shift, GRID, const __grid_constant__ TensorMap skip, \
                                  int skip_steps, int own) { \
    const Output out = PRODUCT_OUTPUT(shift, rows_per_shift, NONE); \
    product<S, true, true, IMAGE>(Pixels<S>{a, skip, b, GRID_OF, taps, taps_across, channel_steps, skip_steps, own, rows / (width * height)}, out, \
                                     PRODUCT_CUT); \
  }
#define BACKWARD_X(tile, S) \
  KERNEL_SM90(conv2d_sm90_backward_x_##tile)(PRODUCT, GRID) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, NONE); \
    product<S, true, false, PLAIN>(TurnedPixels<S>{a, b, GRID_OF, taps, taps_across, channel_steps}, out, PRODUCT_CUT); \
  }
#define BACKWARD_WEIGHT(tile, S) \
  KERNEL_SM90(conv2d_sm90_backward_weight_##tile)(PRODUCT, GRID) { \
    const Output out = PRODUCT_OUTPUT(nullptr, 1, NONE); \
    product<S, false, false, PLAIN>(WeightGradient<S>{a, b, GRID_OF, taps_across}, out, PRODUCT_CUT); \
  }

#if defined(T_FLOAT32)
FORWARD(split_forward_256, Tile256)
FORWARD(split_forward_128_pingpong, Tile128Pingpong)
#else
FORWARD(forward_256, Tile256)
FORWARD(forward_160, Tile160)
FORWARD(forward_160_pingpong, Tile160Pingpong)
FORWARD(forward_128_pingpong, Tile128Pingpong)
FORWARD(forward_160_tall, Tile160Tall)
BACKWARD_X(256, Tile256)
BACKWARD_X(160, Tile160)
BACKWARD_X(160_tall, Tile160Tall)
BACKWARD_X(128_pingpong, Tile128Pingpong)
BACKWARD_WEIGHT(256, Tile256)
BACKWARD_WEIGHT(160, Tile160)
BACKWARD_WEIGHT(128_pingpong, Tile128Pingpong)
#endif
