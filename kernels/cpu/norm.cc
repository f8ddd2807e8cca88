// Group norm (+SiLU) over [n, hw, c], layer norm and softmax over rows. Statistics are float32 sums of fixed chunks
// combined in order; the variance is taken about the mean in a second pass, so a mean far above the spread costs nothing.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

// Rows per chunk: the unit of work, and of the order of summation.
constexpr int CHUNK = 64;

inline int chunks_of(int hw) { return (hw + CHUNK - 1) / CHUNK; }

struct Scratch {
  float *data;
  explicit Scratch(int64_t count) : data(new float[size_t(count)]()) {}
  ~Scratch() { delete[] data; }
};

// Per chunk and channel: body(image, chunk, first, last, sums of `width` floats).
template <class F> void each_chunk(int n, int hw, F &&body) {
  const int chunks = chunks_of(hw);
  parallel_for(int64_t(n) * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int chunk = int(job % chunks);
      const int last = (chunk + 1) * CHUNK < hw ? (chunk + 1) * CHUNK : hw;
      body(int(job / chunks), chunk, chunk * CHUNK, last);
    }
  });
}

template <class T>
void group_norm_forward(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int n, int hw, int c, int groups,
                        int silu, float eps) {
  const int chunks = chunks_of(hw), width = c / groups;
  Scratch sums(int64_t(n) * chunks * c), squares(int64_t(n) * chunks * c);
  each_chunk(n, hw, [&](int image, int chunk, int first, int last) {
    float *sum = sums.data + (int64_t(image) * chunks + chunk) * c;
    for (int r = first; r < last; r++) {
      const T *row = x + (int64_t(image) * hw + r) * c;
      for (int k = 0; k < c; k++) sum[k] += to_float(row[k]);
    }
    // Squares about the chunk's own channel mean: combined below by Chan's formula.
    float *square = squares.data + (int64_t(image) * chunks + chunk) * c;
    const float inverse = 1.f / float(last - first);
    for (int r = first; r < last; r++) {
      const T *row = x + (int64_t(image) * hw + r) * c;
      for (int k = 0; k < c; k++) {
        const float d = to_float(row[k]) - sum[k] * inverse;
        square[k] += d * d;
      }
    }
  });
  for (int image = 0; image < n; image++)
    for (int g = 0; g < groups; g++) {
      double total = 0;
      for (int chunk = 0; chunk < chunks; chunk++)
        for (int k = g * width; k < (g + 1) * width; k++) total += sums.data[(int64_t(image) * chunks + chunk) * c + k];
      const double mu = total / (double(hw) * width);
      double spread = 0;
      for (int chunk = 0; chunk < chunks; chunk++) {
        const int rows = (chunk + 1) * CHUNK < hw ? CHUNK : hw - chunk * CHUNK;
        for (int k = g * width; k < (g + 1) * width; k++) {
          const int64_t at = (int64_t(image) * chunks + chunk) * c + k;
          const double d = sums.data[at] / double(rows) - mu;
          spread += squares.data[at] + rows * d * d;
        }
      }
      mean[image * groups + g] = float(mu);
      rstd[image * groups + g] = float(1. / std::sqrt(spread / (double(hw) * width) + eps));
    }
  Scratch affine(int64_t(n) * 2 * c);
  for (int image = 0; image < n; image++)
    for (int k = 0; k < c; k++) {
      const float a = rstd[image * groups + k / width] * to_float(weight[k]);
      affine.data[int64_t(image) * 2 * c + k] = a;
      affine.data[(int64_t(image) * 2 + 1) * c + k] = to_float(bias[k]);
    }
  each_chunk(n, hw, [&](int image, int, int first, int last) {
    const float *a = affine.data + int64_t(image) * 2 * c, *b = a + c;
    Scratch mu(c);
    for (int k = 0; k < c; k++) mu.data[k] = mean[image * groups + k / width];
    for (int r = first; r < last; r++) {
      const T *row = x + (int64_t(image) * hw + r) * c;
      T *out = y + (int64_t(image) * hw + r) * c;
      if (silu) {
        for (int k = 0; k < c; k++) {
          const float z = (to_float(row[k]) - mu.data[k]) * a[k] + b[k];
          out[k] = from_float<T>(z * sigmoid(z));
        }
      } else {
        for (int k = 0; k < c; k++) out[k] = from_float<T>((to_float(row[k]) - mu.data[k]) * a[k] + b[k]);
      }
    }
  });
}

template <class T>
void group_norm_backward(T *dx, T *dweight, T *dbias, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                         const float *rstd, int n, int hw, int c, int groups, int silu) {
  const int chunks = chunks_of(hw), width = c / groups;
  const auto outer = [&](int image, int64_t at, int k, float &h) {
    const int g = image * groups + k / width;
    h = (to_float(x[at]) - mean[g]) * rstd[g];
    const float dz = to_float(dy[at]);
    if (!silu) return dz;
    const float z = h * to_float(weight[k]) + to_float(bias[k]), s = sigmoid(z);
    return dz * s * (1.f + z * (1.f - s));
  };
  Scratch dz_sums(int64_t(n) * chunks * c), dzh_sums(int64_t(n) * chunks * c);
  each_chunk(n, hw, [&](int image, int chunk, int first, int last) {
    float *dz_sum = dz_sums.data + (int64_t(image) * chunks + chunk) * c;
    float *dzh_sum = dzh_sums.data + (int64_t(image) * chunks + chunk) * c;
    for (int r = first; r < last; r++)
      for (int k = 0; k < c; k++) {
        float h;
        const float dz = outer(image, (int64_t(image) * hw + r) * c + k, k, h);
        dz_sum[k] += dz;
        dzh_sum[k] += dz * h;
      }
  });
  Scratch means(int64_t(n) * groups * 2), dw(c), db(c);
  for (int image = 0; image < n; image++)
    for (int k = 0; k < c; k++) {
      double dz = 0, dzh = 0;
      for (int chunk = 0; chunk < chunks; chunk++) {
        dz += dz_sums.data[(int64_t(image) * chunks + chunk) * c + k];
        dzh += dzh_sums.data[(int64_t(image) * chunks + chunk) * c + k];
      }
      dw.data[k] += float(dzh);
      db.data[k] += float(dz);
      float *group = means.data + (int64_t(image) * groups + k / width) * 2;
      group[0] += float(dz * to_float(weight[k]) / (double(hw) * width));
      group[1] += float(dzh * to_float(weight[k]) / (double(hw) * width));
    }
  for (int k = 0; k < c; k++) {
    if (dweight) dweight[k] = from_float<T>(dw.data[k]);
    if (dbias) dbias[k] = from_float<T>(db.data[k]);
  }
  if (!dx) return;
  each_chunk(n, hw, [&](int image, int, int first, int last) {
    for (int r = first; r < last; r++)
      for (int k = 0; k < c; k++) {
        const int g = image * groups + k / width;
        const int64_t at = (int64_t(image) * hw + r) * c + k;
        float h;
        const float dz = outer(image, at, k, h);
        dx[at] = from_float<T>(rstd[g] * (dz * to_float(weight[k]) - means.data[g * 2] - h * means.data[g * 2 + 1]));
      }
  });
}

template <class T>
void layer_norm_forward(T *y, float *mean, float *rstd, const T *x, const T *weight, const T *bias, int rows, int c, float eps) {
  parallel_for(rows, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const T *row = x + r * c;
      float total = 0, spread = 0;
#pragma GCC ivdep
      for (int k = 0; k < c; k++) total += to_float(row[k]);
      const float mu = total / float(c);
      for (int k = 0; k < c; k++) {
        const float d = to_float(row[k]) - mu;
        spread += d * d;
      }
      const float scale = 1.f / std::sqrt(spread / float(c) + eps);
      mean[r] = mu;
      rstd[r] = scale;
      for (int k = 0; k < c; k++)
        y[r * c + k] = from_float<T>((to_float(row[k]) - mu) * scale * to_float(weight[k]) + to_float(bias[k]));
    }
  });
}

template <class T>
void layer_norm_backward(T *dx, T *dweight, T *dbias, const T *dy, const T *x, const T *weight, const float *mean, const float *rstd,
                         int rows, int c) {
  const int chunks = chunks_of(rows);
  Scratch dw(int64_t(chunks) * c), db(int64_t(chunks) * c);
  each_chunk(1, rows, [&](int, int chunk, int first, int last) {
    float *dw_sum = dw.data + int64_t(chunk) * c, *db_sum = db.data + int64_t(chunk) * c;
    for (int64_t r = first; r < last; r++) {
      const T *row = x + r * c, *grad = dy + r * c;
      float mean_g = 0, mean_gh = 0;
      for (int k = 0; k < c; k++) {
        const float h = (to_float(row[k]) - mean[r]) * rstd[r], dz = to_float(grad[k]), g = dz * to_float(weight[k]);
        dw_sum[k] += dz * h;
        db_sum[k] += dz;
        mean_g += g;
        mean_gh += g * h;
      }
      mean_g /= float(c);
      mean_gh /= float(c);
      if (!dx) continue;
      for (int k = 0; k < c; k++) {
        const float h = (to_float(row[k]) - mean[r]) * rstd[r];
        dx[r * c + k] = from_float<T>(rstd[r] * (to_float(grad[k]) * to_float(weight[k]) - mean_g - h * mean_gh));
      }
    }
  });
  for (int k = 0; k < c; k++) {
    float weights = 0, biases = 0;
    for (int chunk = 0; chunk < chunks; chunk++) {
      weights += dw.data[int64_t(chunk) * c + k];
      biases += db.data[int64_t(chunk) * c + k];
    }
    if (dweight) dweight[k] = from_float<T>(weights);
    if (dbias) dbias[k] = from_float<T>(biases);
  }
}

template <class T> void softmax_forward(T *y, const T *x, int rows, int c) {
  parallel_for(rows, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      float max = to_float(x[r * c]), total = 0;
      for (int k = 1; k < c; k++) max = to_float(x[r * c + k]) > max ? to_float(x[r * c + k]) : max;
      for (int k = 0; k < c; k++) total += fast_exp(to_float(x[r * c + k]) - max);
      for (int k = 0; k < c; k++) y[r * c + k] = from_float<T>(fast_exp(to_float(x[r * c + k]) - max) / total);
    }
  });
}

template <class T> void softmax_backward(T *dx, const T *dy, const T *y, int rows, int c) {
  parallel_for(rows, 1 + GRAIN / c, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      float dot = 0;
      for (int k = 0; k < c; k++) dot += to_float(dy[r * c + k]) * to_float(y[r * c + k]);
      for (int k = 0; k < c; k++) dx[r * c + k] = from_float<T>(to_float(y[r * c + k]) * (to_float(dy[r * c + k]) - dot));
    }
  });
}

EXPORT_FLOATS(group_norm_forward, group_norm_forward)
EXPORT_FLOATS(group_norm_backward, group_norm_backward)
EXPORT_FLOATS(layer_norm_forward, layer_norm_forward)
EXPORT_FLOATS(layer_norm_backward, layer_norm_backward)
EXPORT_FLOATS(softmax_forward, softmax_forward)
EXPORT_FLOATS(softmax_backward, softmax_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
