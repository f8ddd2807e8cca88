// Elementwise optimizer steps, each one pass over a parameter: AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023),
// the moving average of weights, and the sum of squares behind global-norm clipping. State is float32 (AdamW's moments may be
// bfloat16), as is all arithmetic; what depends on the step alone comes ready from the caller, who has doubles.
#include "optimizer.h"

namespace sdxl {
namespace ARCH {
namespace {

// M is the moments' type. The step is taken with the new ones before they are rounded.
template <class T, class M>
void adamw(T *weight, float *master, const T *gradient, M *exp_avg, M *exp_avg_sq, int n, float gradient_scale, float decay,
           float one_minus_beta1, float beta2, float one_minus_beta2, float step_size, float inverse_correction2, float eps,
           int stochastic, int seed_low, int seed_high, int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  each(n, [=](int64_t i, int64_t count) {
    const vf g = load(gradient + i, count) * gradient_scale, m0 = load(exp_avg + i, count);
    const vf m = m0 + one_minus_beta1 * (g - m0);
    const vf v = load(exp_avg_sq + i, count) * beta2 + one_minus_beta2 * g * g;
    store_moment(exp_avg + i, m, weights.rounding, i, FIRST_MOMENT, count);
    store_moment(exp_avg_sq + i, v, weights.rounding, i, SECOND_MOMENT, count);
    weights.write(i, weights.read(i, count) * decay - step_size * (m / (sqrt(v) * inverse_correction2 + eps)), count);
  });
}

template <class T>
void lion_forward(T *weight, float *master, const T *gradient, float *exp_avg, int n, float gradient_scale, float decay,
                  float one_minus_beta1, float one_minus_beta2, float lr, int stochastic, int seed_low, int seed_high,
                  int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  each(n, [=](int64_t i, int64_t count) {
    const vf g = load(gradient + i, count) * gradient_scale, m = load(exp_avg + i, count);
    const vf c = m + one_minus_beta1 * (g - m), none = {};
    const vf sign = c > 0.f ? none + 1.f : (c < 0.f ? none - 1.f : c);
    store(exp_avg + i, m + one_minus_beta2 * (g - m), count);
    weights.write(i, weights.read(i, count) * decay - lr * sign, count);
  });
}

template <class T> void ema_forward(float *ema, const T *weight, int n, float one_minus_decay) {
  each(n, [=](int64_t i, int64_t count) {
    const vf old = load(ema + i, count);
    store(ema + i, old - one_minus_decay * (old - load(weight + i, count)), count);
  });
}

// sums[index] = the sum of squares, by chunks that depend on n alone; float32 within a chunk, double over them.
template <class T> void sum_squares_forward(float *sums, const T *x, int n, int index) {
  constexpr int64_t LENGTH = 1024;
  const int64_t chunks = (int64_t(n) + LENGTH - 1) / LENGTH;
  Floats partial(chunks);
  parallel_for(chunks, GRAIN / LENGTH, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t start = chunk * LENGTH, stop = n - start < LENGTH ? n : start + LENGTH;
      vf total = {};
      for (int64_t i = start; i < stop; i += LANES) {
        const vf value = load(x + i, stop - i);
        total += value * value;
      }
      partial.data[chunk] = reduce_add(total);
    }
  });
  double total = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) total += double(partial.data[chunk]);
  sums[index] = float(total);
}

EXPORT(adamw_forward_float32, adamw<float, float>)
EXPORT(adamw_forward_bfloat16, adamw<bf16, float>)
EXPORT(adamw_forward_float16, adamw<f16, float>)
EXPORT(adamw_bf16_moments_forward_float32, adamw<float, bf16>)
EXPORT(adamw_bf16_moments_forward_bfloat16, adamw<bf16, bf16>)
EXPORT(adamw_bf16_moments_forward_float16, adamw<f16, bf16>)
EXPORT_FLOATS(lion_forward, lion_forward)
EXPORT_FLOATS(ema_forward, ema_forward)
EXPORT_FLOATS(sum_squares_forward, sum_squares_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
