// What a convolution of few channels needs beside a plain matrix product (engine/cuda/plan_im2col.ts): its taps laid out as
// columns before it (im2col), or summed after it (col2im). With few channels a pixel of one tap is no 16 bytes, which is what
// the matrix kernels read; all taps of a pixel are. And dy spread as far apart as strides left it.
// im2col's columns are [kh][kw][channels], what an output pixel sees of x; or `turned`: [channels][kh][kw], as the rows of a
// weight are, what an input pixel sees of dy. col2im's are those of the other one.
#include "wide.cuh"

// The image whose pixels the taps see, and the grid of pixels that see them.
struct Geometry {
  int h, w, channels, height, width, kh, kw, stride, top, left, turned;
};
#define GEOMETRY int h, int w, int channels, int height, int width, int kh, int kw, int stride, int top, int left, int turned
#define GEOMETRY_OF Geometry{h, w, channels, height, width, kh, kw, stride, top, left, turned}

// The pixel of the image that tap (i, j) of pixel (y, x) of the grid in image `n` sees; -1 outside.
DEVICE int seen(const Geometry &g, int n, int y, int x, int i, int j) {
  const int row = g.turned ? y + g.top - i : y * g.stride - g.top + i, column = g.turned ? x + g.left - j : x * g.stride - g.left + j;
  return uint32_t(row) < uint32_t(g.h) && uint32_t(column) < uint32_t(g.w) ? (n * g.h + row) * g.w + column : -1;
}

DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
template <class Half> DEVICE uint32_t bits_of(Half x) { return x.bits; }

struct Pixel {
  int n, y, x;
};
DEVICE Pixel pixel_of(const Geometry &g, uint32_t p) {
  const uint32_t row = p / g.width;
  return {int(row / g.height), int(row % g.height), int(p % g.width)};
}

// to[pixels][across * FEW], zeros behind the last column. A thread has 8 bytes, whose columns are counted up in their digits:
// divisions are long.
constexpr int FEW = 8 / sizeof(T);

KERNEL(im2col)(T *to, const T *image, int pixels, GEOMETRY, int across) {
  const Geometry g = GEOMETRY_OF;
  const int low = turned ? kw : channels, middle = turned ? kh : kw, columns = kh * kw * channels;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < uint32_t(pixels) * across; job += gridDim.x * blockDim.x) {
    const Pixel p = pixel_of(g, job / across);
    const int first = int(job % across) * FEW;
    int a = first % low, b = first / low % middle, c = first / low / middle;
    uint32_t run[2] = {};
#pragma unroll
    for (int e = 0; e < FEW; e++) {
      const int at = first + e < columns ? seen(g, p.n, p.y, p.x, turned ? b : c, turned ? a : b) : -1;
      const T value = image[at < 0 ? 0 : int64_t(at) * channels + (turned ? c : a)];
      run[e * sizeof(T) / 4] |= at < 0 ? 0 : bits_of(value) << e * sizeof(T) % 4 * 8;
      a++;
      b += a == low, a = a == low ? 0 : a;
      c += b == middle, b = b == middle ? 0 : b;
    }
    reinterpret_cast<uint2 *>(to)[job] = make_uint2(run[0], run[1]);
  }
}

// y[pixels][channels] = the sum over taps of sums[pixel that the tap sees][its column] + bias + shift + residual.
KERNEL(col2im)(T *y, const float *sums, const T *bias, const T *shift, const T *residual, int pixels, GEOMETRY, int stride_of_sums) {
  const Geometry g = GEOMETRY_OF;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < uint32_t(pixels) * channels; job += gridDim.x * blockDim.x) {
    const Pixel p = pixel_of(g, job / channels);
    const int channel = int(job % channels), first = turned ? channel : channel * kh * kw, step = turned ? channels : 1;
    float total = 0;
#pragma unroll 1
    for (int i = 0; i < kh; i++)
#pragma unroll 3
      for (int j = 0; j < kw; j++) {
        const int at = seen(g, p.n, p.y, p.x, i, j);
        const float value = sums[int64_t(max(at, 0)) * stride_of_sums + first + (i * kw + j) * step];
        total += at < 0 ? 0.f : value;
      }
    if (bias != nullptr) total += to_float(bias[channel]);
    if (shift != nullptr) total += to_float(shift[p.n * channels + channel]);
    if (residual != nullptr) total += to_float(residual[job]);
    y[job] = from_float<T>(total);
  }
}

#if !defined(T_FLOAT32) // for Hopper's kernels

// to[n, (h - 1) stride + 1, (w - 1) stride + 1, c] = dy[n, h, w, c], `stride` pixels apart, and zeros between them.
KERNEL(spread)(T *to, const T *dy, int n, int h, int w, int c, int stride) {
  const int height = (h - 1) * stride + 1, width = (w - 1) * stride + 1, across = c / WIDE<T>;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < uint32_t(n) * height * width * across; job += gridDim.x * blockDim.x) {
    const uint32_t pixel = job / across, row = pixel / width;
    const int x = int(pixel % width), y = int(row % height);
    const bool there = x % stride == 0 && y % stride == 0;
    const int from = there ? ((int(row / height) * h + y / stride) * w + x / stride) * across + int(job % across) : 0;
    uint4 run = reinterpret_cast<const uint4 *>(dy)[from];
    if (!there) run = {};
    reinterpret_cast<uint4 *>(to)[job] = run;
  }
}

#endif
