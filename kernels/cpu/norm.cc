// Layer norm and softmax over rows.
#include "norm.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class T>
void layer_norm_forward(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int rows, int c, float eps) {
  parallel_for(rows, rows_per_range(c), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *row = x + r * c;
      const float mu = row_sum(c, [&](int k, auto lanes) { return load(row + k, lanes); }) / float(c);
      const float spread = row_sum(c, [&](int k, auto lanes) {
        const vf d = load(row + k, lanes) - mu;
        return d * d;
      });
      const float inverse = 1.f / sqrt(spread / float(c) + eps);
      mean[r] = mu;
      rstd[r] = inverse;
      each_vector(c, [&](int k, auto lanes) {
        const vf h = (load(row + k, lanes) - mu) * inverse;
        store(y + r * c + k, h * load(weight + k, lanes) + load(bias + k, lanes), lanes);
      });
    }
  });
}

template <class T>
void layer_norm_backward(T *dx, T *dweight, T *dbias, const T *dy, const T *x, const T *weight, const float *mean, const float *rstd,
                         int rows, int c) {
  const Chunks chunks(1, rows, c);
  Row weight_sums(chunks.count() * c), bias_sums(chunks.count() * c);
  chunks.each([&](int64_t chunk, int64_t first, int count) {
    for (int64_t r = first; r < first + count; r++) {
      const T *row = x + r * c, *grad = dy + r * c;
      float *weights = &weight_sums[chunk * c], *biases = &bias_sums[chunk * c];
      const auto normal = [&](int k) { return (load(row + k, c - k) - mean[r]) * rstd[r]; };
      const auto scaled = [&](int k) { return load(grad + k, c - k) * load(weight + k, c - k); };
      for (int k = 0; k < c; k += LANES) {
        const vf dz = load(grad + k, c - k);
        store(weights + k, load(weights + k, c - k) + dz * normal(k), c - k);
        store(biases + k, load(biases + k, c - k) + dz, c - k);
      }
      if (!dx) continue;
      const float centre = row_sum(c, [&](int k, int) { return scaled(k); }) / float(c);
      const float slope = row_sum(c, [&](int k, int) { return scaled(k) * normal(k); }) / float(c);
      for (int k = 0; k < c; k += LANES) store(dx + r * c + k, rstd[r] * (scaled(k) - centre - normal(k) * slope), c - k);
    }
  });
  const auto total = [&](T *to, const Row &sums) {
    std::vector<double> totals(c);
    for (size_t i = 0; i < sums.size(); i += size_t(c))
      for (int k = 0; k < c; k++) totals[k] += sums[i + k];
    for (int k = 0; k < c; k++) to[k] = from_float<T>(float(totals[k]));
  };
  if (dweight) total(dweight, weight_sums);
  if (dbias) total(dbias, bias_sums);
}

// ---- softmax

template <class T> void softmax_forward(T *y, const T *x, int rows, int c) {
  parallel_for(rows, rows_per_range(c), [&](int64_t begin, int64_t end) {
    Row exps(c + LANES);
    for (int64_t r = begin; r < end; r++) {
      const T *row = x + r * c;
      float most = to_float(row[0]);
      vf mosts = splat(most);
      int k = 0;
      for (; k + LANES <= c; k += LANES) mosts = max(load(row + k), mosts);
      most = reduce_max(mosts);
      for (; k < c; k++) most = std::max(most, to_float(row[k]));
      const float total = row_sum(c, [&](int k, auto lanes) {
        const vf e = fast_exp(load(row + k, lanes) - most);
        store(&exps[k], e);
        return e;
      });
      const float inverse = 1.f / total;
      for (int k = 0; k < c; k += LANES) store(y + r * c + k, load(&exps[k]) * inverse, c - k);
    }
  });
}

template <class T> void softmax_backward(T *dx, const T *dy, const T *y, int rows, int c) {
  parallel_for(rows, rows_per_range(c), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *grad = dy + r * c, *row = y + r * c;
      const float dot = row_sum(c, [&](int k, auto lanes) { return load(grad + k, lanes) * load(row + k, lanes); });
      for (int k = 0; k < c; k += LANES) store(dx + r * c + k, load(row + k, c - k) * (load(grad + k, c - k) - dot), c - k);
    }
  });
}

EXPORT_FLOATS(layer_norm_forward, layer_norm_forward)
EXPORT_FLOATS(layer_norm_backward, layer_norm_backward)
EXPORT_FLOATS(softmax_forward, softmax_forward)
EXPORT_FLOATS(softmax_backward, softmax_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
