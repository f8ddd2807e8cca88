// One step of Adafactor (Shazeer & Stern 2018) as transformers' with a given learning rate. A matrix [outer, rows, columns,
// inner] keeps the means of its squared gradients over columns and over rows, per outer and inner: a linear layer is one
// matrix of inner 1, a convolution [o, kh, kw, i] has one of kh x kw for each pair of channels. The update's root mean square
// is needed before the first weight changes, so the gradient is read up to three times.
#include "optimizer.h"

namespace sdxl {
namespace ARCH {
namespace {

struct Step {
  float gradient_scale, beta2, one_minus_beta2, eps, lr, decay, clip_threshold;
};

// The factor of every update: lr / max(1, rms / clip_threshold), from partial sums of squares taken in order.
float step_size(const Step &step, const Floats &partial, int64_t parts, double count) {
  double total = 0;
  for (int64_t i = 0; i < parts; i++) total += double(partial.data[i]);
  const double excess = std::sqrt(total / count) / double(step.clip_threshold);
  return float(double(step.lr) / (excess > 1 ? excess : 1));
}

inline vf squared(vf g, float eps) { return g * g + eps; }

// Takes the mean `sum / count` into a moment and returns the moment.
inline vf moment(float *p, vf sum, float count, const Step &step, int64_t width) {
  const vf next = load(p, width) * step.beta2 + step.one_minus_beta2 * (sum / count);
  store(p, next, width);
  return next;
}

inline vf rsqrt(vf x) { return 1.f / sqrt(x); }

// Lanes beyond `count` as zeros: what is loaded there is 0, but eps is not.
inline vf kept(vf x, int64_t count) {
  if (count >= LANES) return x;
  for (int64_t i = count; i < LANES; i++) x[i] = 0;
  return x;
}

// ---- one matrix with inner 1: linear layers and tables ----

template <class T> struct Matrix {
  const T *gradient;
  float *row, *col;
  int64_t rows, columns;
  Step step;
  // Rows of a job, from the shape alone.
  int64_t height() const { return columns * 8 > GRAIN ? 8 : GRAIN / columns; }
  int64_t jobs() const { return (rows + height() - 1) / height(); }

  template <class F> void each_job(F &&body) const {
    parallel_for(jobs(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; job++) {
        const int64_t first = job * height(), last = first + height();
        body(job, first, last < rows ? last : rows);
      }
    });
  }

  vf at(int64_t i, int64_t count) const { return load(gradient + i, count) * step.gradient_scale; }

  void moments() const {
    Floats partial(jobs() * columns);
    each_job([&](int64_t job, int64_t first, int64_t last) {
      float *sums = partial.data + job * columns;
      for (int64_t c = 0; c < columns; c++) sums[c] = 0;
      for (int64_t r = first; r < last; r++) {
        vf total = {};
        vectors(0, columns, [&](int64_t c, int64_t count) {
          const vf u = kept(squared(at(r * columns + c, count), step.eps), count);
          total += u;
          store(sums + c, load(sums + c, count) + u, count);
        });
        row[r] = row[r] * step.beta2 + step.one_minus_beta2 * (reduce_add(total) / float(columns));
      }
    });
    const int64_t parts = jobs();
    each(int(columns), [&](int64_t c, int64_t count) {
      vf total = {};
      for (int64_t job = 0; job < parts; job++) total += load(partial.data + job * columns + c, count);
      moment(col + c, total, float(rows), step, count);
    });
  }

  void apply(const Weights<T> &weights) const {
    moments();
    double total = 0;
    for (int64_t r = 0; r < rows; r++) total += double(row[r]);
    const float mean = float(total / double(rows));
    Floats row_factor(rows), col_factor(columns), partial(jobs());
    for (int64_t r = 0; r < rows; r++) row_factor.data[r] = 1.f / sqrt(row[r] / mean);
    each(int(columns), [&](int64_t c, int64_t count) { store(col_factor.data + c, rsqrt(load(col + c, count)), count); });
    const auto update = [&](int64_t r, int64_t c, int64_t count) {
      return at(r * columns + c, count) * (row_factor.data[r] * load(col_factor.data + c, count));
    };
    each_job([&](int64_t job, int64_t first, int64_t last) {
      double sum = 0;
      for (int64_t r = first; r < last; r++) {
        vf lanes = {};
        vectors(0, columns, [&](int64_t c, int64_t count) {
          const vf u = kept(update(r, c, count), count);
          lanes += u * u;
        });
        sum += double(reduce_add(lanes));
      }
      partial.data[job] = float(sum);
    });
    const float size = step_size(step, partial, jobs(), double(rows) * double(columns));
    each_job([&](int64_t, int64_t first, int64_t last) {
      for (int64_t r = first; r < last; r++)
        vectors(0, columns, [&](int64_t c, int64_t count) {
          const int64_t i = r * columns + c;
          weights.write(i, weights.read(i, count) * step.decay - size * update(r, c, count), count);
        });
    });
  }
};

// ---- many small matrices side by side: convolutions ----

template <class T> struct Matrices {
  const T *gradient;
  float *row, *col;
  int64_t outer, rows, columns, inner;
  Step step;

  vf at(int64_t o, int64_t r, int64_t c, int64_t i, int64_t count) const {
    return load(gradient + place(o, r, c, i), count) * step.gradient_scale;
  }
  int64_t place(int64_t o, int64_t r, int64_t c, int64_t i) const { return ((o * rows + r) * columns + c) * inner + i; }
  float *row_at(int64_t o, int64_t r, int64_t i) const { return row + (o * rows + r) * inner + i; }
  float *col_at(int64_t o, int64_t c, int64_t i) const { return col + (o * columns + c) * inner + i; }

  // body(o, i, count) for every vector of matrices.
  template <class F> void each_vector(F &&body) const {
    parallel_for(outer, rows_per_range(rows * columns * inner), [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; o++) vectors(0, inner, [&](int64_t i, int64_t count) { body(o, i, count); });
    });
  }

  void moments(int64_t o, int64_t i, int64_t count) const {
    for (int64_t r = 0; r < rows; r++) {
      vf total = {};
      for (int64_t c = 0; c < columns; c++) total += squared(at(o, r, c, i, count), step.eps);
      moment(row_at(o, r, i), total, float(columns), step, count);
    }
    for (int64_t c = 0; c < columns; c++) {
      vf total = {};
      for (int64_t r = 0; r < rows; r++) total += squared(at(o, r, c, i, count), step.eps);
      moment(col_at(o, c, i), total, float(rows), step, count);
    }
  }

  // use(place, update) for every element of a vector of matrices, from moments that are done.
  template <class F> void updates(int64_t o, int64_t i, int64_t count, F &&use) const {
    vf mean = {};
    for (int64_t r = 0; r < rows; r++) mean += load(row_at(o, r, i), count);
    mean = mean / float(rows);
    for (int64_t r = 0; r < rows; r++) {
      const vf row_factor = rsqrt(load(row_at(o, r, i), count) / mean);
      for (int64_t c = 0; c < columns; c++)
        use(place(o, r, c, i), at(o, r, c, i, count) * (row_factor * rsqrt(load(col_at(o, c, i), count))));
    }
  }

  void apply(const Weights<T> &weights) const {
    Floats partial(outer);
    for (int64_t o = 0; o < outer; o++) partial.data[o] = 0;
    each_vector([&](int64_t o, int64_t i, int64_t count) {
      moments(o, i, count);
      vf lanes = {};
      updates(o, i, count, [&](int64_t, vf u) { lanes += kept(u, count) * kept(u, count); });
      partial.data[o] += reduce_add(lanes);
    });
    const float size = step_size(step, partial, outer, double(outer) * double(rows * columns * inner));
    each_vector([&](int64_t o, int64_t i, int64_t count) {
      updates(o, i, count, [&](int64_t at, vf u) {
        weights.write(at, weights.read(at, count) * step.decay - size * u, count);
      });
    });
  }
};

template <class T>
void adafactor_forward(T *weight, float *master, const T *gradient, float *row, float *col, int outer, int rows, int columns,
                       int inner, float gradient_scale, float beta2, float one_minus_beta2, float eps, float lr, float decay,
                       float clip_threshold, int stochastic, int seed_low, int seed_high, int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  const Step step{gradient_scale, beta2, one_minus_beta2, eps, lr, decay, clip_threshold};
  if (outer == 1 && inner == 1) Matrix<T>{gradient, row, col, rows, columns, step}.apply(weights);
  else Matrices<T>{gradient, row, col, outer, rows, columns, inner, step}.apply(weights);
}

// ---- vectors keep every second moment ----

template <class T>
void adafactor_vector_forward(T *weight, float *master, const T *gradient, float *exp_avg_sq, int n, float gradient_scale,
                              float beta2, float one_minus_beta2, float eps, float lr, float decay, float clip_threshold,
                              int stochastic, int seed_low, int seed_high, int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  const Step step{gradient_scale, beta2, one_minus_beta2, eps, lr, decay, clip_threshold};
  const auto update = [&](int64_t i, int64_t count) {
    return load(gradient + i, count) * gradient_scale * rsqrt(load(exp_avg_sq + i, count));
  };
  const int64_t jobs = (int64_t(n) + GRAIN - 1) / GRAIN;
  Floats partial(jobs);
  parallel_for(jobs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t job = begin; job < end; job++) {
      const int64_t first = job * GRAIN, last = first + GRAIN < n ? first + GRAIN : n;
      vf lanes = {};
      vectors(first, last, [&](int64_t i, int64_t count) {
        moment(exp_avg_sq + i, squared(load(gradient + i, count) * gradient_scale, eps), 1.f, step, count);
        const vf u = kept(update(i, count), count);
        lanes += u * u;
      });
      partial.data[job] = reduce_add(lanes);
    }
  });
  const float size = step_size(step, partial, jobs, double(n));
  each(n, [&](int64_t i, int64_t count) {
    weights.write(i, weights.read(i, count) * decay - size * update(i, count), count);
  });
}

EXPORT_FLOATS(adafactor_forward, adafactor_forward)
EXPORT_FLOATS(adafactor_vector_forward, adafactor_vector_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
