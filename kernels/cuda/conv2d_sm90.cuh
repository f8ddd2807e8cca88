// What conv2d's matrix products on Hopper have alike: an image operand that TMA gathers. A tile's rows are pixels of a
// walked grid, each read at the offset of a tap, with zeros outside the image. Pixels that are whole rows of the grid,
// or a part of one, are a box of the image; TMA's im2col, which walks any grid, takes some 8 cycles a pixel by an
// H200's times, thrice what boxes do. k runs over taps x channels, each tap's channels padded with zeros to whole
// steps. The weight [o, taps, c] is a map [taps][o][c].
#pragma once
#include "product_sm90.cuh"

// Pixel (x, y) of a grid of width x height stands at (x * stride + left, y * stride + top) of the image. Boxed: its map
// is tiled, in boxes of as many pixels as are loaded.
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

#define GRID int width, int height, int stride, int left, int top, int boxed, int taps, int taps_across, int channel_steps
#define GRID_OF Grid{width, height, stride, left, top, boxed}
