// conv2d, channels last, as matrix products over an implicit im2col: k (or n) runs over taps x channels, and a tap outside
// the image reads zeros. The gradient of x is the same gather over dy, a tap counting only where it falls on a stride step.
#include "gemm.cuh"

struct Geometry {
  int n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left;
};

// Columns are [kh][kw][channels]: which tap a column is, and where its channel lies in the first pixel of an image whose pixels
// are `stride` channels.
struct Tap {
  int i, j; // i < 0: past the last column
  const T *channel;
  int stride;
};

DEVICE Tap tap_of(int column, const T *data, int channels, const Geometry &g) {
  const int tap = column / channels;
  if (tap >= g.kh * g.kw) return {-1, 0, data, 0};
  return {tap / g.kw, tap % g.kw, data + column - tap * channels, channels};
}

// Where a pixel's taps begin; y is far below zero past the last pixel.
struct Pixel {
  int image, y, x;
};

DEVICE Pixel pixel_of(int r, int n, int height, int width) {
  const int row = r / width, image = row / height;
  if (image >= n) return {0, -(1 << 20), 0};
  return {image, row - image * height, r - row * width};
}

// A row is an output pixel; its columns are what its taps see in x.
struct InputTaps {
  const T *data;
  Geometry g;
  typedef Pixel Line;
  typedef Tap Column;
  __device__ Line line(int r) const {
    const Pixel p = pixel_of(r, g.n, g.oh, g.ow);
    return {p.image, p.y * g.stride - g.pad_top, p.x * g.stride - g.pad_left};
  }
  __device__ Column column(int c) const { return tap_of(c, data, g.c, g); }
  __device__ const T *at(const Line &p, const Column &tap) const {
    const int y = p.y + tap.i, x = p.x + tap.j;
    if (tap.i < 0 || uint32_t(y) >= uint32_t(g.h) || uint32_t(x) >= uint32_t(g.w)) return nullptr;
    return tap.channel + int64_t((p.image * g.h + y) * g.w + x) * tap.stride;
  }
};

// The same where the first `own` channels are those of `data`, the others those of `skip`.
struct InputTapsBeside : InputTaps {
  const T *skip;
  int own;
  __device__ Column column(int c) const {
    Tap tap = InputTaps::column(c);
    const int channel = tap.channel - data;
    tap.stride = channel < own ? own : g.c - own;
    if (channel >= own) tap.channel = skip + channel - own;
    return tap;
  }
};

// A row is an input pixel; its columns are the dy of the output pixels that its taps fed.
struct OutputTaps {
  const T *data;
  Geometry g;
  typedef Pixel Line;
  typedef Tap Column;
  __device__ Line line(int r) const {
    const Pixel p = pixel_of(r, g.n, g.h, g.w);
    return {p.image, p.y + g.pad_top, p.x + g.pad_left};
  }
  __device__ Column column(int c) const { return tap_of(c, data, g.o, g); }
  __device__ const T *at(const Line &p, const Column &tap) const {
    int y = p.y - tap.i, x = p.x - tap.j;
    if (tap.i < 0 || y < 0 || x < 0) return nullptr;
    if (g.stride > 1) {
      if (y % g.stride != 0 || x % g.stride != 0) return nullptr;
      y /= g.stride;
      x /= g.stride;
    }
    if (y >= g.oh || x >= g.ow) return nullptr;
    return tap.channel + int64_t((p.image * g.oh + y) * g.ow + x) * g.o;
  }
};

// weight[o, taps, c] seen as rows [taps][o] of c.
struct TapMajorWeight {
  const T *data;
  int o, taps, c;
  struct Line {
    const T *from;
  };
  typedef int Column;
  __device__ Line line(int r) const {
    const int tap = r / o;
    return {tap < taps ? data + (int64_t(r - tap * o) * taps + tap) * c : nullptr};
  }
  __device__ Column column(int k) const { return k < c ? k : -1; }
  __device__ const T *at(const Line &line, Column k) const { return line.from == nullptr || k < 0 ? nullptr : line.from + k; }
};

#define GEOMETRY int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw, int stride, int pad_top, int pad_left
#define TAIL int splits, int k_part, int whole
#define GEOMETRY_OF Geometry{n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left}

#define CONV2D(shape, S) \
  KERNEL_OF(S::COUNT, conv2d_forward_##shape)(T *y, float *partial, const T *x, const T *weight, const T *bias, const T *shift, \
                                              const T *residual, const T *skip, GEOMETRY, int own, TAIL) { \
    const Output out = {y, partial, bias, shift, residual, o, o, oh * ow, NONE}; \
    const Problem size = {n * oh * ow, o, kh * kw * c, splits, k_part}; \
    gemm<S, true, true, false>(out, InputTapsBeside{{x, GEOMETRY_OF}, skip, own}, Matrix{weight, o, size.k, size.k}, size, whole & 1, whole & 2); \
  } \
  KERNEL_OF(S::COUNT, conv2d_backward_x_##shape)(T *dx, float *partial, const T *dy, const T *weight, GEOMETRY, TAIL) { \
    const Output out = {dx, partial, nullptr, nullptr, nullptr, c, c, 1, NONE}; \
    const Problem size = {n * h * w, c, kh * kw * o, splits, k_part}; \
    gemm<S, true, false, false>(out, OutputTaps{dy, GEOMETRY_OF}, TapMajorWeight{weight, o, kh * kw, c}, size, whole & 1, whole & 2); \
  } \
  KERNEL_OF(S::COUNT, conv2d_backward_weight_##shape)(T *dweight, float *partial, const T *dy, const T *x, GEOMETRY, TAIL) { \
    const Problem size = {o, kh * kw * c, n * oh * ow, splits, k_part}; \
    const Output out = {dweight, partial, nullptr, nullptr, nullptr, size.n, size.n, 1, NONE}; \
    gemm<S, false, false, false>(out, Matrix{dy, size.k, o, o}, InputTaps{x, GEOMETRY_OF}, size, whole & 1, whole & 2); \
  }

CONV2D(small, Small)
#if !defined(T_FLOAT32)
CONV2D(large, Large)
#endif
