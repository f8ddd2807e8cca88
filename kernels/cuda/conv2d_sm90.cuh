// What conv2d's matrix products on Hopper have alike: an image operand that TMA gathers. A tile's rows are pixels of a
// walked grid, each read at the offset of a tap, with zeros outside the image. Pixels that are whole rows of the grid,
// or a part of one, are a box of the image; TMA's im2col walks any grid. k runs over taps x channels, each tap's
// channels padded with zeros to whole steps. The weight [o, taps, c] is a map [taps][o][c].
#pragma once
#include "product_sm90.cuh"

// Pixel (x, y) of a grid of width x height stands at (x * stride + left, y * stride + top) of the image. Boxed: its map
// is tiled, in boxes of as many pixels as are loaded.
struct Grid {
  int width, height, stride, left, top, boxed;
};

// A place in a grid, and a tap with a step of its channels. Both are found by division once and moved on from there: the one
// thread that brings tiles takes some 150 cycles to divide, which no step of k has to spare.
struct Pixel {
  int column, row, image;
  __device__ Pixel() {}
  __device__ Pixel(int p, const Grid &g) : row(p / g.width), image(row / g.height) {
    column = p - row * g.width;
    row -= image * g.height;
  }
  __device__ void move(int pixels, const Grid &g) {
    for (column += pixels; column >= g.width; column -= g.width) row++;
    for (; row >= g.height; row -= g.height) image++;
  }
};
struct Tap {
  int tap, right, down, inside;
  __device__ Tap() {}
  __device__ Tap(int step, int steps, int taps_across) : tap(step / steps), down(tap / taps_across) {
    right = tap - down * taps_across;
    inside = step - tap * steps;
  }
  __device__ void next(int steps, int taps_across) {
    if (++inside < steps) return;
    inside = 0, tap++;
    if (++right == taps_across) right = 0, down++;
  }
};

// Pixels from `at` on, at the offset of a tap; to this block, or to those of a cluster. The grid begins at image `first` of the map.
DEVICE void load_grid(uint32_t to, const TensorMap &map, uint32_t barrier, int channel, const Pixel &at, const Grid &g, int right, int down,
                      uint16_t blocks = 0, int first = 0) {
  const int x = at.column * g.stride + g.left, y = at.row * g.stride + g.top, image = first + at.image;
  if (g.boxed && blocks) load_box_to(blocks, to, map, barrier, channel, x + right, y + down, image);
  else if (g.boxed) load_box(to, map, barrier, channel, x + right, y + down, image);
  else if (blocks) load_pixels_to(blocks, to, map, barrier, channel, x, y, image, right, down);
  else load_pixels(to, map, barrier, channel, x, y, image, right, down);
}

#define GRID int width, int height, int stride, int left, int top, int boxed, int taps, int taps_across, int channel_steps
#define GRID_OF Grid{width, height, stride, left, top, boxed}
