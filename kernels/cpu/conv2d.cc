// conv2d, channels last, as matrix products over an implicit im2col: k (or n) runs over taps x channels, and a tap outside
// the image reads zeros. The gradient of x is the same gather over dy, a tap counting only where it falls on a stride step.
#include "gemm.h"

#include <algorithm>

namespace sdxl::ARCH {
namespace {

struct Shape {
  int n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left;
};

template <class T> void copy_or_zero(T *to, const T *from, int count) {
  if (from == nullptr) memset(to, 0, size_t(count) * sizeof(T));
  else memcpy(to, from, size_t(count) * sizeof(T));
}

// Rows of taps: a row is a pixel, its columns are [kh][kw][channels]. Derived: source(pixel, tap) -> channels or null.
template <class T, class Derived> struct Taps : Rows<T> {
  const T *data;
  Shape s;
  int channels;
  Taps(const T *data, const Shape &s, int channels) : data(data), s(s), channels(channels) {}
  const T *at(int64_t r, int64_t c, int count, T *scratch) const override {
    const Derived &self = static_cast<const Derived &>(*this);
    const auto pixel = self.pixel(r);
    int tap = int(c / channels), offset = int(c % channels);
    if (count <= channels - offset) {
      const T *from = self.source(pixel, tap / s.kw, tap % s.kw);
      if (from != nullptr) return from + offset;
    }
    for (int done = 0; done < count; tap++, offset = 0) {
      const int run = std::min(channels - offset, count - done);
      const T *from = self.source(pixel, tap / s.kw, tap % s.kw);
      copy_or_zero(scratch + done, from == nullptr ? nullptr : from + offset, run);
      done += run;
    }
    return scratch;
  }
};

struct Pixel {
  int64_t image;
  int y, x;
};

inline Pixel pixel_of(int64_t r, int height, int width) {
  return {r / (int64_t(height) * width), int(r / width % height), int(r % width)};
}

// For each output pixel, what its taps see in x.
template <class T> struct InputTaps final : Taps<T, InputTaps<T>> {
  using Base = Taps<T, InputTaps<T>>;
  InputTaps(const T *x, const Shape &s) : Base(x, s, s.c) {}
  Pixel pixel(int64_t r) const { return pixel_of(r, this->s.oh, this->s.ow); }
  const T *source(const Pixel &p, int i, int j) const {
    const Shape &s = this->s;
    const int y = p.y * s.stride - s.pad_top + i, x = p.x * s.stride - s.pad_left + j;
    if (y < 0 || y >= s.h || x < 0 || x >= s.w) return nullptr;
    return this->data + ((p.image * s.h + y) * s.w + x) * s.c;
  }
};

// For each input pixel, the dy of the output pixels that its taps fed.
template <class T> struct OutputTaps final : Taps<T, OutputTaps<T>> {
  using Base = Taps<T, OutputTaps<T>>;
  OutputTaps(const T *dy, const Shape &s) : Base(dy, s, s.o) {}
  Pixel pixel(int64_t r) const { return pixel_of(r, this->s.h, this->s.w); }
  const T *source(const Pixel &p, int i, int j) const {
    const Shape &s = this->s;
    const int y = p.y + s.pad_top - i, x = p.x + s.pad_left - j;
    if (y < 0 || x < 0 || y % s.stride != 0 || x % s.stride != 0 || y / s.stride >= s.oh || x / s.stride >= s.ow) return nullptr;
    return this->data + ((p.image * s.oh + y / s.stride) * s.ow + x / s.stride) * s.o;
  }
};

// weight[o, taps, c] seen as rows [taps][o] of c.
template <class T> struct TapMajorWeight final : Rows<T> {
  const T *weight;
  int64_t o, taps, channels;
  TapMajorWeight(const T *weight, int64_t o, int64_t taps, int64_t channels)
      : weight(weight), o(o), taps(taps), channels(channels) {}
  const T *at(int64_t r, int64_t c, int, T *) const override { return weight + (r % o * taps + r / o) * channels + c; }
};

template <class T>
void conv2d_forward(T *y, const T *x, const T *weight, const T *bias, const T *shift, const T *residual, int n, int h, int w, int c,
                    int oh, int ow, int o, int kh, int kw, int stride, int pad_top, int pad_left) {
  const int64_t taps = int64_t(kh) * kw;
  Output<T> out{y, o};
  out.bias = bias;
  out.shift = shift;
  out.rows_per_shift = int64_t(oh) * ow;
  out.residual = residual;
  const InputTaps<T> input(x, {n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left});
  gemm<T>(out, {input, false}, {Matrix<T>(weight, taps * c), false}, int64_t(n) * oh * ow, o, taps * c);
}

template <class T>
void conv2d_backward_x(T *dx, const T *dy, const T *weight, int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw,
                       int stride, int pad_top, int pad_left) {
  const int64_t taps = int64_t(kh) * kw;
  const OutputTaps<T> output(dy, {n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left});
  gemm<T>({dx, c}, {output, false}, {TapMajorWeight<T>(weight, o, taps, c), true}, int64_t(n) * h * w, c, taps * o);
}

template <class T>
void conv2d_backward_weight(T *dweight, const T *dy, const T *x, int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw,
                            int stride, int pad_top, int pad_left) {
  const int64_t taps = int64_t(kh) * kw;
  const InputTaps<T> input(x, {n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left});
  gemm<T>({dweight, taps * c}, {Matrix<T>(dy, o), true}, {input, true}, o, taps * c, int64_t(n) * oh * ow);
}

EXPORT_FLOATS(conv2d_forward, conv2d_forward)
EXPORT_FLOATS(conv2d_backward_x, conv2d_backward_x)
EXPORT_FLOATS(conv2d_backward_weight, conv2d_backward_weight)

} // namespace
} // namespace sdxl::ARCH
