// Weight normalization: the lengths of a weight's rows with a product of two matrices added, and channels scaled by such lengths.
#include "norm.h"

namespace sdxl {
namespace ARCH {
namespace {

// y[row] = |weight[row] + scale up[row] down|; weight [rows, inputs], down [rank, inputs], up [rows, rank].
template <class T>
void row_norms_forward(float *y, const T *weight, const T *down, const T *up, int rows, int inputs, int rank, float scale) {
  parallel_for(rows, rows_per_range(int64_t(inputs) * (rank + 1)), [=](int64_t begin, int64_t end) {
    Row factors(rank);
    for (int64_t r = begin; r < end; r++) {
      for (int k = 0; k < rank; k++) factors[k] = scale * to_float(up[r * rank + k]);
      const float squares = row_sum(inputs, [&](int i, auto lanes) {
        vf value = load(weight + r * inputs + i, lanes);
        for (int k = 0; k < rank; k++) value += factors[k] * load(down + int64_t(k) * inputs + i, lanes);
        return value * value;
      });
      y[r] = sqrt(squares);
    }
  });
}

// What is zero stays zero.
inline float inverse_of(float norm) { return norm == 0.f ? 1.f : 1.f / norm; }

// y = x magnitude / norms + bias, channel by channel.
template <class T> void weight_norm_forward(T *y, const T *x, const float *magnitude, const float *norms, const T *bias, int rows, int c) {
  Row factors(c + LANES);
  for (int k = 0; k < c; k++) factors[k] = magnitude[k] * inverse_of(norms[k]);
  parallel_for(rows, rows_per_range(c), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      each_vector(c, [&](int k, auto lanes) {
        vf value = load(x + r * c + k, lanes) * load(&factors[k]);
        if (bias) value += load(bias + k, lanes);
        store(y + r * c + k, value, lanes);
      });
  });
}

// The gradient of the magnitude: the sum over rows of dy x, over the norms.
template <class T> void weight_norm_backward(float *dmagnitude, const T *dy, const T *x, const float *norms, int rows, int c) {
  const Chunks chunks(1, rows, c);
  Row sums(chunks.count() * c);
  chunks.each([&](int64_t chunk, int64_t first, int count) {
    float *own = &sums[chunk * c];
    for (int64_t r = first; r < first + count; r++)
      for (int k = 0; k < c; k += LANES)
        store(own + k, load(own + k, c - k) + load(dy + r * c + k, c - k) * load(x + r * c + k, c - k), c - k);
  });
  for (int k = 0; k < c; k++) {
    double total = 0;
    for (int64_t chunk = 0; chunk < chunks.count(); chunk++) total += sums[chunk * c + k];
    dmagnitude[k] = float(total) * inverse_of(norms[k]);
  }
}

EXPORT_FLOATS(row_norms_forward, row_norms_forward)
EXPORT_FLOATS(weight_norm_forward, weight_norm_forward)
EXPORT_FLOATS(weight_norm_backward, weight_norm_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
