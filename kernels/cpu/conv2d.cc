// conv2d, channels last, as matrix products over an implicit im2col: k (or n) runs over taps x channels, and a tap outside
// the image reads zeros. Taps side by side in a row of the kernel read pixels side by side in memory, so away from the image's
// sides they are one run, read in place; that is what makes few channels cheap. The gradient of x is the same product over
// dy, for one phase of the stride at a time: the pixels y = phase (mod stride) are fed by the same few taps, so no product
// with a zero is made.
#include "gemm.h"

#include <algorithm>
#include <vector>

namespace sdxl::ARCH {
namespace {

struct Shape {
  int n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left;
};

struct Tap {
  int y, x, index;   // offset in the source, place in the weight's [kh][kw]
  int following = 0; // how many taps after it each read the next pixel of the same row
};

std::vector<Tap> joined(std::vector<Tap> taps) {
  for (size_t i = taps.size(); i-- > 1;)
    if (taps[i].y == taps[i - 1].y && taps[i].x == taps[i - 1].x + 1) taps[i - 1].following = taps[i].following + 1;
  return taps;
}

// Channels of a source that lie together: `width` of each pixel, from channel `begin` on.
template <class T> struct Part {
  const T *data;
  int64_t begin, width;
};

// Row r is pixel (image, y, x) of a grid; its columns are [taps][channels], the pixels (y, x) * step + tap of the source. The
// first channels may lie in one tensor and the last in another; taps are then not joined.
template <class T> struct Taps final : Rows<T> {
  Part<T> first_part, last_part;
  int64_t channels, source_height, source_width, height, width, step;
  const std::vector<Tap> &taps;
  Taps(const T *data, int64_t channels, int64_t source_height, int64_t source_width, int64_t height, int64_t width, int64_t step,
       const std::vector<Tap> &taps)
      : first_part{data, 0, channels}, last_part{nullptr, channels, 0}, channels(channels), source_height(source_height),
        source_width(source_width), height(height), width(width), step(step), taps(taps) {}

  const Part<T> &part_of(int64_t channel) const { return channel < last_part.begin ? first_part : last_part; }

  // Taps that are read as one: at the sides of an image they come apart into short pieces, which narrow ones have too many of.
  int64_t together() const { return width < 32 || taps.empty() ? 1 : taps[0].following + 1; }
  int64_t run() const override { return channels * together(); }

  const T *source(const Part<T> &part, int64_t image, int64_t y, int64_t x) const {
    return part.data + ((image * source_height + y) * source_width + x) * part.width;
  }

  // Pixels whose `count` taps from `first` on all lie inside.
  Range inside(const Tap &first, int64_t count) const {
    const int64_t room = source_width - count - first.x;
    return {std::max<int64_t>(0, (step - 1 - first.x) / step), room < 0 ? 0 : room / step + 1};
  }

  void fetch(const T **to, Range rows, Range columns, T *scratch) const override {
    const int64_t count = columns.count(), offset = columns.begin % channels, end = rows.end;
    const Tap &first = taps[columns.begin / channels];
    const Part<T> &part = part_of(offset);
    const bool one_run = offset - part.begin + count <= (first.following + 1) * part.width;
    const Range whole = inside(first, (offset + count - 1) / channels + 1);
    int64_t x = rows.begin % width, y = rows.begin / width % height, image = rows.begin / (width * height);
    for (int64_t r = rows.begin; r < end;) {
      const int64_t v = y * step + first.y;
      if (one_run && v >= 0 && v < source_height && x >= whole.begin && x < whole.end) {
        const T *from = source(part, image, v, x * step + first.x) + offset - part.begin;
        const int64_t stop = std::min({whole.end, width, x + end - r});
        for (; x < stop; x++, r++, from += step * part.width) *to++ = from;
      } else {
        gather(scratch, image, y, x, &first, offset, count);
        *to++ = scratch;
        scratch += count;
        x++, r++;
      }
      if (x == width) {
        x = 0;
        if (++y == height) y = 0, image++;
      }
    }
  }

  // `count` elements of a pixel's row from channel `at` of a tap on.
  void gather(T *into, int64_t image, int64_t y, int64_t x, const Tap *tap, int64_t at, int64_t count) const {
    while (count > 0) {
      const Part<T> &part = part_of(at);
      const int64_t v = y * step + tap->y, u = x * step + tap->x;
      const bool found = v >= 0 && v < source_height && u >= 0 && u < source_width;
      const int64_t many = found ? std::min<int64_t>(tap->following + 1, source_width - u) : 1;
      const int64_t run = std::min(part.begin + many * part.width - at, count);
      if (found) memcpy(into, source(part, image, v, u) + at - part.begin, size_t(run) * sizeof(T));
      else memset(into, 0, size_t(run) * sizeof(T));
      into += run, count -= run, at += run;
      if (at >= channels) tap += many, at = 0;
    }
  }

  int strips(Strip<T> *to, Range rows, Range columns) const override {
    constexpr int64_t SHORTEST = 32; // elements of a run worth a micro-kernel of their own
    if (run() < SHORTEST || width < 4 || !in_words<T>(step * first_part.width) || !in_words<T>(step * last_part.width)) return -1;
    int found = 0;
    for (int64_t c = columns.begin, end; c < columns.end; c = end) {
      const int64_t first = c / channels, last = (first / together() + 1) * together() - 1;
      const Part<T> &part = part_of(c - first * channels);
      end = std::min(columns.end, part.begin + part.width < channels ? first * channels + part.width : (last + 1) * channels);
      // Those on either side of it go one by one.
      const Range whole = inside(taps[first], last - first + 1);
      for (int64_t r = rows.begin, x, stop; r < rows.end; r += stop - x) {
        x = r % width, stop = std::min(width, x + rows.end - r);
        const int64_t v = r / width % height * step + taps[first].y;
        if (v < 0 || v >= source_height) continue;
        for (int64_t px = x, next; px < stop; px = next) {
          next = px >= whole.begin && px < whole.end ? std::min(stop, whole.end) : px + 1;
          const int64_t u = px * step + taps[first].x; // where the first tap reads
          const Range seen{std::max(c, (first - std::min<int64_t>(u, 0)) * channels),
                           std::min(end, (first + source_width - u) * channels)};
          if (seen.begin >= seen.end) continue;
          if (found == MAX_STRIPS) return -1;
          const T *pixels = source(part, r / (width * height), v, u) + seen.begin - first * channels - part.begin;
          to[found++] = {pixels, step * part.width, int(r - rows.begin + px - x), int(next - px), seen};
        }
      }
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
  return joined(std::move(taps));
}

// The taps that reach input pixels (top, left) + stride * (y, x), as offsets of the output pixel from (y, x). Backwards, so
// that these grow along a row.
std::vector<Tap> phase_taps(const Shape &s, int top, int left) {
  std::vector<Tap> taps;
  for (int i = s.kh * s.kw; i-- > 0;) {
    const int y = top + s.pad_top - i / s.kw, x = left + s.pad_left - i % s.kw;
    if (y % s.stride == 0 && x % s.stride == 0) taps.push_back({y / s.stride, x / s.stride, i});
  }
  return joined(std::move(taps));
}

template <class T> Taps<T> input_taps(const T *x, const Shape &s, const std::vector<Tap> &taps) {
  return {x, s.c, s.h, s.w, s.oh, s.ow, s.stride, taps};
}

// The first `own` channels are x's, the others skip's.
template <class T>
void conv2d_forward(T *y, const T *x, const T *weight, const T *bias, const T *shift, const T *residual, const T *skip, int n, int h, int w,
                    int c, int oh, int ow, int o, int kh, int kw, int stride, int pad_top, int pad_left, int own) {
  const Shape s{n, h, w, c, oh, ow, o, kh, kw, stride, pad_top, pad_left};
  std::vector<Tap> taps = forward_taps(s);
  Taps<T> image = input_taps(x, s, taps);
  if (skip != nullptr) {
    image.first_part.width = own;
    image.last_part = {skip, own, c - own};
    for (Tap &tap : taps) tap.following = 0;
  }
  const int64_t k = int64_t(kh) * kw * c;
  Output<T> out{y, o};
  out.bias = bias;
  out.shift = shift;
  out.rows_per_shift = int64_t(oh) * ow;
  out.residual = residual;
  gemm<T>(out, {image, false}, {Matrix<T>(weight, k), false}, int64_t(n) * oh * ow, o, k);
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
