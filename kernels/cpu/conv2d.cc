// conv2d, channels last, as matrix products over an implicit im2col: k (or n) runs over taps x channels, and a tap outside
// the image reads zeros. The gradient of x is the same product over dy, for one phase of the stride at a time: the pixels
// y = phase (mod stride) are fed by the same few taps, so no product with a zero is made.
#include "gemm.h"

#include <algorithm>
#include <vector>

namespace sdxl::ARCH {
namespace {

struct Shape {
  int n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left;
};

struct Tap {
  int y, x, index; // offset in the source, place in the weight's [kh][kw]
};

// Row r is pixel (image, y, x) of a grid; its columns are [taps][channels], the pixels (y, x) * step + tap of the source.
template <class T> struct Taps final : Rows<T> {
  const T *data;
  int64_t channels, source_height, source_width, height, width, step;
  const std::vector<Tap> &taps;
  Taps(const T *data, int64_t channels, int64_t source_height, int64_t source_width, int64_t height, int64_t width, int64_t step,
       const std::vector<Tap> &taps)
      : data(data), channels(channels), source_height(source_height), source_width(source_width), height(height), width(width),
        step(step), taps(taps) {}

  int64_t run() const override { return channels; }

  const T *source(int64_t image, int64_t y, int64_t x) const {
    return y < 0 || y >= source_height || x < 0 || x >= source_width ? nullptr
                                                                    : data + ((image * source_height + y) * source_width + x) * channels;
  }

  void fetch(const T **to, Range rows, Range columns, T *scratch) const override {
    const int64_t count = columns.count(), tap = columns.begin / channels, offset = columns.begin % channels;
    int64_t x = rows.begin % width, y = rows.begin / width % height, image = rows.begin / (width * height);
    for (int64_t r = rows.begin; r < rows.end; r++, scratch += count) {
      const T *from = source(image, y * step + taps[tap].y, x * step + taps[tap].x);
      if (from != nullptr && offset + count <= channels) *to++ = from + offset;
      else {
        *to++ = scratch;
        int64_t at = offset;
        for (int64_t done = 0, t = tap; done < count; t++, at = 0) {
          const int64_t run = std::min(channels - at, count - done);
          from = source(image, y * step + taps[t].y, x * step + taps[t].x);
          if (from == nullptr) memset(scratch + done, 0, size_t(run) * sizeof(T));
          else memcpy(scratch + done, from + at, size_t(run) * sizeof(T));
          done += run;
        }
      }
      if (++x == width) {
        x = 0;
        if (++y == height) y = 0, image++;
      }
    }
  }

  int strips(Strip<T> *to, Range rows, Range columns) const override {
    constexpr int64_t SHORTEST = 32; // elements of a run worth a micro-kernel of their own
    const int64_t runs = (columns.end - 1) / channels - columns.begin / channels + 1;
    if (channels < SHORTEST || width < 4 || !spreads<T>(step * channels) || (rows.count() / width + 2) * runs > MAX_STRIPS) return -1;
    int found = 0;
    for (int64_t c = columns.begin; c < columns.end;) {
      const Tap &tap = taps[c / channels];
      const int64_t end = std::min(columns.end, (c / channels + 1) * channels);
      for (int64_t r = rows.begin; r < rows.end;) {
        const int64_t x = r % width, y = r / width % height * step + tap.y, last = std::min(width, x + rows.end - r);
        // The pixels of this row that the tap finds inside the source.
        const int64_t low = std::max(x, tap.x >= 0 ? 0 : (-tap.x + step - 1) / step);
        const int64_t high = std::min(last, source_width > tap.x ? (source_width - 1 - tap.x) / step + 1 : 0);
        if (y >= 0 && y < source_height && low < high)
          to[found++] = {source(r / (width * height), y, low * step + tap.x) + c % channels, step * channels,
                         int(r - rows.begin + low - x), int(high - low), {c, end}};
        r += last - x;
      }
      c = end;
    }
    return found;
  }
};

// weight[o, taps, c] seen as rows [taps][o] of c, for the given taps.
template <class T> struct TapMajorWeight final : Rows<T> {
  const T *weight;
  int64_t o, all, channels;
  const std::vector<Tap> &taps;
  TapMajorWeight(const T *weight, int64_t o, int64_t all, int64_t channels, const std::vector<Tap> &taps)
      : weight(weight), o(o), all(all), channels(channels), taps(taps) {}
  void fetch(const T **to, Range rows, Range columns, T *) const override {
    for (int64_t r = rows.begin; r < rows.end; r++)
      *to++ = weight + (r % o * all + taps[size_t(r / o)].index) * channels + columns.begin;
  }
  int strips(Strip<T> *, Range, Range) const override { return -1; }
};

std::vector<Tap> forward_taps(const Shape &s) {
  std::vector<Tap> taps;
  for (int i = 0; i < s.kh * s.kw; i++) taps.push_back({i / s.kw - s.pad_top, i % s.kw - s.pad_left, i});
  return taps;
}

// The taps that reach input pixels (top, left) + stride * (y, x), as offsets of the output pixel from (y, x).
std::vector<Tap> phase_taps(const Shape &s, int top, int left) {
  std::vector<Tap> taps;
  for (int i = 0; i < s.kh * s.kw; i++) {
    const int y = top + s.pad_top - i / s.kw, x = left + s.pad_left - i % s.kw;
    if (y % s.stride == 0 && x % s.stride == 0) taps.push_back({y / s.stride, x / s.stride, i});
  }
  return taps;
}

template <class T> Taps<T> input_taps(const T *x, const Shape &s, const std::vector<Tap> &taps) {
  return {x, s.c, s.h, s.w, s.oh, s.ow, s.stride, taps};
}

template <class T>
void conv2d_forward(T *y, const T *x, const T *weight, const T *bias, const T *shift, const T *residual, int n, int h, int w, int c,
                    int oh, int ow, int o, int kh, int kw, int stride, int pad_top, int pad_left) {
  const Shape s{n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left};
  const std::vector<Tap> taps = forward_taps(s);
  const int64_t k = int64_t(kh) * kw * c;
  Output<T> out{y, o};
  out.bias = bias;
  out.shift = shift;
  out.rows_per_shift = int64_t(oh) * ow;
  out.residual = residual;
  gemm<T>(out, {input_taps(x, s, taps), false}, {Matrix<T>(weight, k), false}, int64_t(n) * oh * ow, o, k);
}

template <class T>
void conv2d_backward_x(T *dx, const T *dy, const T *weight, int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw,
                       int stride, int pad_top, int pad_left) {
  const Shape s{n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left};
  for (int top = 0; top < std::min(stride, h); top++)
    for (int left = 0; left < std::min(stride, w); left++) {
      const std::vector<Tap> taps = phase_taps(s, top, left);
      Output<T> out{dx, c};
      out.grid = {(h - top + stride - 1) / stride, (w - left + stride - 1) / stride, stride, top, left, h, w};
      const Taps<T> output(dy, o, oh, ow, out.grid.height, out.grid.width, 1, taps);
      const TapMajorWeight<T> flipped(weight, o, int64_t(kh) * kw, c, taps);
      gemm<T>(out, {output, false}, {flipped, true}, n * out.grid.height * out.grid.width, c, int64_t(taps.size()) * o);
    }
}

template <class T>
void conv2d_backward_weight(T *dweight, const T *dy, const T *x, int n, int h, int w, int c, int oh, int ow, int o, int kh, int kw,
                            int stride, int pad_top, int pad_left) {
  const Shape s{n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left};
  const std::vector<Tap> taps = forward_taps(s);
  const int64_t columns = int64_t(kh) * kw * c;
  gemm<T>({dweight, columns}, {Matrix<T>(dy, o), true}, {input_taps(x, s, taps), true}, o, columns, int64_t(n) * oh * ow);
}

EXPORT_FLOATS(conv2d_forward, conv2d_forward)
EXPORT_FLOATS(conv2d_backward_x, conv2d_backward_x)
EXPORT_FLOATS(conv2d_backward_weight, conv2d_backward_weight)

} // namespace
} // namespace sdxl::ARCH
