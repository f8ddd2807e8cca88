// Group norm (+SiLU) over [n, hw, c]. Statistics are taken in one read: sums of values and squares about a number that lies among
// them, the group's mean in one row, so that little cancels however far the mean lies from zero.
#include "norm.h"

namespace sdxl {
namespace ARCH {
namespace {

// What of an image's channels lie together: rows of `width`, which are the channels from `begin` on.
template <class T> struct Part {
  const T *data;
  int begin, width;
};

// The first channels of each row lie in x, the last, if there are any, in skip.
template <class T> struct Image {
  Part<T> parts[2];
  int count;
  Image(const T *x, const T *skip, int own, int c) : parts{{x, 0, own}, {skip, own, c - own}}, count(own < c ? 2 : 1) {}
  // Whether no vector of a row lies in both, so that each is rounded as it would be in a joined image.
  bool in_vectors() const { return parts[0].width % LANES == 0 || count == 1; }
  const Part<T> *begin() const { return parts; }
  const Part<T> *end() const { return parts + count; }
};

// Sums of (x - centre) and its square over each channel of `rows` rows of c. Rows go by eights, so that memory is read in
// order and the running sums are touched an eighth as often.
template <class T> void channel_sums(float *sums, float *squares, const float *centre, const T *x, int rows, int c) {
  std::fill_n(sums, c, 0.f);
  std::fill_n(squares, c, 0.f);
  const auto add_rows = [&](const T *row, auto how_many) {
    each_vector(c, [&](int k, auto lanes) {
      const vf shift = load(centre + k);
      vf sum = load(sums + k), square = load(squares + k);
#pragma GCC unroll 8
      for (int i = 0; i < how_many(); i++) {
        const vf d = load(row + int64_t(i) * c + k, lanes) - shift;
        sum += d;
        square += d * d;
      }
      store(sums + k, sum);
      store(squares + k, square);
    });
  };
  int r = 0;
  for (; r + 8 <= rows; r += 8) add_rows(x + int64_t(r) * c, [] { return 8; });
  for (; r < rows; r++) add_rows(x + int64_t(r) * c, [] { return 1; });
}

// The sum of `count` floats, which are followed by a vector more.
inline float sum_of(const float *x, int count) {
  vf total = first_lanes(load(x + count / LANES * LANES), count % LANES);
  for (int k = 0; k + LANES <= count; k += LANES) total += load(x + k);
  return reduce_add(total);
}

// Floats that a thread keeps between calls.
inline float *scratch(int64_t count) {
  static thread_local Row memory;
  if (int64_t(memory.size()) < count) memory.resize(size_t(count));
  return memory.data();
}

template <class T>
void group_statistics(float *mean, float *rstd, const Image<T> &x, const Chunks &chunks, int groups, float eps) {
  const int c = chunks.c, width = c / groups, padded = c + LANES;
  // Per image: each channel's centre, its group's mean in the middle row.
  Row centres(int64_t(chunks.n) * padded);
  for (int64_t image = 0; image < chunks.n; image++) {
    float *centre = &centres[image * padded];
    for (const Part<T> &part : x) {
      const T *row = part.data + (image * chunks.hw + chunks.hw / 2) * part.width;
      each_vector(part.width, [&](int k, auto lanes) { store(centre + part.begin + k, load(row + k, lanes), lanes); });
    }
    for (int g = 0; g < groups; g++) std::fill_n(centre + g * width, width, sum_of(centre + g * width, width) / float(width));
  }
  // Per chunk and group: the sum and the sum of squares about the centre.
  std::vector<float> partial(size_t(chunks.count() * groups * 2));
  chunks.each([&](int64_t chunk, int64_t first, int rows) {
    float *sums = scratch(2 * padded), *squares = sums + padded, *to = &partial[size_t(chunk * groups * 2)];
    const float *centre = &centres[chunks.image(chunk) * padded];
    for (const Part<T> &part : x)
      channel_sums(sums + part.begin, squares + part.begin, centre + part.begin, part.data + first * part.width, rows, part.width);
    for (int g = 0; g < groups; g++) {
      *to++ = sum_of(sums + g * width, width);
      *to++ = sum_of(squares + g * width, width);
    }
  });
  const double count = double(chunks.hw) * width;
  for (int64_t image = 0; image < chunks.n; image++)
    for (int g = 0; g < groups; g++) {
      double sum = 0, square = 0;
      for (int64_t chunk = image * chunks.per_image; chunk < (image + 1) * chunks.per_image; chunk++) {
        sum += partial[size_t((chunk * groups + g) * 2)];
        square += partial[size_t((chunk * groups + g) * 2 + 1)];
      }
      const double from_centre = sum / count;
      mean[image * groups + g] = float(centres[image * padded + g * width] + from_centre);
      rstd[image * groups + g] = float(1. / std::sqrt(std::max(0., square / count - from_centre * from_centre) + eps));
    }
}

// Per channel of each image: the group's mean and rstd, and the layer's weight and bias as float.
class Affine {
public:
  template <class T>
  Affine(const float *mean, const float *rstd, const T *weight, const T *bias, int n, int c, int groups)
      : c(c), means(int64_t(n) * c), rstds(int64_t(n) * c), factors(int64_t(n) * c), shifts(int64_t(n) * c),
        weights(c), biases(c) {
    for (int k = 0; k < c; k++) {
      weights[k] = to_float(weight[k]);
      biases[k] = to_float(bias[k]);
    }
    const int width = c / groups;
    for (int64_t image = 0; image < n; image++)
      for (int g = 0; g < groups; g++)
        for (int k = g * width; k < (g + 1) * width; k++) {
          const int64_t at = image * c + k;
          means[at] = mean[image * groups + g];
          rstds[at] = rstd[image * groups + g];
          factors[at] = rstds[at] * weights[k];
          shifts[at] = biases[k] - means[at] * factors[at];
        }
  }
  vf mean(int64_t image, int k) const { return load(&means[image * c + k], c - k); }
  vf rstd(int64_t image, int k) const { return load(&rstds[image * c + k], c - k); }
  vf weight(int k) const { return load(&weights[k], c - k); }
  vf bias(int k) const { return load(&biases[k], c - k); }
  // y = x * factor + shift before SiLU.
  const float *factors_of(int64_t image) const { return &factors[image * c]; }
  const float *shifts_of(int64_t image) const { return &shifts[image * c]; }
  float weight_of(int k) const { return weights[k]; }

private:
  const int c;
  Row means, rstds, factors, shifts, weights, biases;
};

// y = SiLU(x * factor + shift) of `c` neighbours in a row.
template <class T, bool with_silu> void apply_row(T *y, const T *x, const float *factors, const float *shifts, int c) {
  constexpr int W = 4;
  int k = 0;
  for (; k + W * LANES <= c; k += W * LANES) {
    vf z[W];
#pragma GCC unroll 4
    for (int i = 0; i < W; i++) z[i] = load(x + k + i * LANES) * load(factors + k + i * LANES) + load(shifts + k + i * LANES);
    if (with_silu) silu<T>(z);
#pragma GCC unroll 4
    for (int i = 0; i < W; i++) store(y + k + i * LANES, z[i]);
  }
  each_vector(c - k, [&, k](int more, auto lanes) {
    const int at = k + more;
    vf z[1] = {load(x + at, lanes) * load(factors + at, lanes) + load(shifts + at, lanes)};
    if (with_silu) silu<T>(z);
    store(y + at, z[0], lanes);
  });
}

template <class T, bool with_silu> void group_apply(T *y, const Image<T> &x, const Affine &affine, const Chunks &chunks) {
  chunks.each([&](int64_t chunk, int64_t first, int rows) {
    const float *factors = affine.factors_of(chunks.image(chunk)), *shifts = affine.shifts_of(chunks.image(chunk));
    std::vector<T> joined(x.in_vectors() ? 0 : chunks.c);
    for (int64_t r = first; r < first + rows; r++) {
      T *to = y + r * chunks.c;
      if (x.in_vectors())
        for (const Part<T> &part : x)
          apply_row<T, with_silu>(to + part.begin, part.data + r * part.width, factors + part.begin, shifts + part.begin, part.width);
      else {
        for (const Part<T> &part : x) std::copy_n(part.data + r * part.width, part.width, &joined[part.begin]);
        apply_row<T, with_silu>(to, joined.data(), factors, shifts, chunks.c);
      }
    }
  });
}

template <class T>
void group_norm_forward(T *y, float *mean, float *rstd, const T *x, const T *skip, const T *weight, const T *bias, int n, int hw, int c,
                        int own, int groups, int silu, float eps) {
  const Chunks chunks(n, hw, c);
  const Image<T> image(x, skip, own, c);
  group_statistics(mean, rstd, image, chunks, groups, eps);
  const Affine affine(mean, rstd, weight, bias, n, c, groups);
  if (silu) group_apply<T, true>(y, image, affine, chunks);
  else group_apply<T, false>(y, image, affine, chunks);
}

// Calls body(normalised x, gradient before SiLU, place, k) for the vectors of a chunk, a column of rows at a time.
template <bool silu, class T, class F>
void each_gradient(const T *dy, const T *x, const Affine &affine, int64_t image, int64_t first, int rows, int c, int k, F &&body) {
  const vf mean = affine.mean(image, k), rstd = affine.rstd(image, k), weight = affine.weight(k), bias = affine.bias(k);
  for (int64_t at = first * c + k; at < (first + rows) * c; at += c) {
    const vf h = (load(x + at, c - k) - mean) * rstd;
    vf dz = load(dy + at, c - k);
    if constexpr (silu) {
      const vf z = h * weight + bias, s = sigmoid(z);
      dz = dz * s * (1.f + z * (1.f - s));
    }
    body(at, h, dz);
  }
}

// Over each image and channel, [n, c]: the sums of dz and of dz * h.
template <bool silu, class T>
void gradient_sums(std::vector<double> &dz, std::vector<double> &dzh, const T *dy, const T *x, const Affine &affine,
                   const Chunks &chunks) {
  const int c = chunks.c;
  Row dz_sums(chunks.count() * c), dzh_sums(chunks.count() * c);
  chunks.each([&](int64_t chunk, int64_t first, int rows) {
    for (int k = 0; k < c; k += LANES) {
      vf sum{}, product{};
      each_gradient<silu>(dy, x, affine, chunks.image(chunk), first, rows, c, k, [&](int64_t, vf h, vf d) {
        sum += d;
        product += d * h;
      });
      store(&dz_sums[chunk * c + k], sum, c - k);
      store(&dzh_sums[chunk * c + k], product, c - k);
    }
  });
  for (int64_t chunk = 0; chunk < chunks.count(); chunk++) {
    const int64_t to = chunks.image(chunk) * c, from = chunk * c;
    for (int k = 0; k < c; k++) dz[to + k] += dz_sums[from + k];
    for (int k = 0; k < c; k++) dzh[to + k] += dzh_sums[from + k];
  }
}

// dx = rstd * (dz w - mean(dz w) - h mean(dz w h)), the means over the group.
template <bool silu, class T>
void group_input_gradient(T *dx, const T *dy, const T *x, const Affine &affine, const Chunks &chunks, int groups,
                          const std::vector<double> &dz, const std::vector<double> &dzh) {
  const int c = chunks.c, width = c / groups;
  Row first_mean(int64_t(chunks.n) * c), second_mean(int64_t(chunks.n) * c);
  for (int64_t start = 0; start < int64_t(chunks.n) * c; start += width) {
    double first = 0, second = 0;
    for (int64_t i = start; i < start + width; i++) {
      first += dz[i] * affine.weight_of(int(i % c));
      second += dzh[i] * affine.weight_of(int(i % c));
    }
    std::fill_n(&first_mean[start], width, float(first / (double(chunks.hw) * width)));
    std::fill_n(&second_mean[start], width, float(second / (double(chunks.hw) * width)));
  }
  chunks.each([&](int64_t chunk, int64_t first, int rows) {
    const int64_t image = chunks.image(chunk);
    for (int k = 0; k < c; k += LANES) {
      const vf rstd = affine.rstd(image, k), weight = affine.weight(k);
      const vf mean = load(&first_mean[image * c + k], c - k), slope = load(&second_mean[image * c + k], c - k);
      each_gradient<silu>(dy, x, affine, image, first, rows, c, k, [&](int64_t at, vf h, vf d) {
        store(dx + at, rstd * (d * weight - mean - h * slope), c - k);
      });
    }
  });
}

// to[k] = the sum over images of sums[n, c].
template <class T> void sum_images(T *to, const std::vector<double> &sums, int c) {
  for (int k = 0; k < c; k++) {
    double total = 0;
    for (size_t i = size_t(k); i < sums.size(); i += size_t(c)) total += sums[i];
    to[k] = from_float<T>(float(total));
  }
}

template <class T>
void group_norm_backward(T *dx, T *dweight, T *dbias, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                         const float *rstd, int n, int hw, int c, int groups, int silu) {
  const Chunks chunks(n, hw, c);
  const Affine affine(mean, rstd, weight, bias, n, c, groups);
  std::vector<double> dz(int64_t(n) * c), dzh(int64_t(n) * c);
  if (silu) gradient_sums<true>(dz, dzh, dy, x, affine, chunks);
  else gradient_sums<false>(dz, dzh, dy, x, affine, chunks);
  if (dweight) sum_images(dweight, dzh, c);
  if (dbias) sum_images(dbias, dz, c);
  if (!dx) return;
  if (silu) group_input_gradient<true>(dx, dy, x, affine, chunks, groups, dz, dzh);
  else group_input_gradient<false>(dx, dy, x, affine, chunks, groups, dz, dzh);
}

EXPORT_FLOATS(group_norm_forward, group_norm_forward)
EXPORT_FLOATS(group_norm_backward, group_norm_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
