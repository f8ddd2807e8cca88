// One step of Prodigy (Mishchenko & Defazio 2023): each parameter's moments with its part of the two sums that d is made of, then d,
// then each weight. Sums are float32 within a chunk, whose length is the same for all tensors, and double over chunks.
#include "optimizer.h"

namespace sdxl {
namespace ARCH {
namespace {

// sums[numerator] = the sum of g (p0 - w), sums[denominator] = the sum of |s| as it is after the step.
template <class T>
void prodigy_moments_forward(const T *weight, const float *master, const T *gradient, const T *p0, float *exp_avg,
                             float *exp_avg_sq, float *s, float *sums, int n, int numerator, int denominator,
                             float gradient_scale, float beta1, float beta2, float beta3, float rate1, float rate2,
                             float rate3) {
  constexpr int64_t LENGTH = 1024;
  const int64_t chunks = (int64_t(n) + LENGTH - 1) / LENGTH;
  Floats partial(2 * chunks);
  parallel_for(chunks, GRAIN / LENGTH, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; chunk++) {
      const int64_t start = chunk * LENGTH, stop = n - start < LENGTH ? n : start + LENGTH;
      vf products = {}, sizes = {};
      vectors(start, stop, [&](int64_t i, int64_t count) {
        const vf g = load(gradient + i, count) * gradient_scale;
        products += g * (load(p0 + i, count) - (master ? load(master + i, count) : load(weight + i, count)));
        store(exp_avg + i, load(exp_avg + i, count) * beta1 + rate1 * g, count);
        store(exp_avg_sq + i, load(exp_avg_sq + i, count) * beta2 + rate2 * g * g, count);
        const vf sum = load(s + i, count) * beta3 + rate3 * g;
        store(s + i, sum, count);
        sizes += sum < 0.f ? -sum : sum;
      });
      partial.data[chunk] = reduce_add(products);
      partial.data[chunks + chunk] = reduce_add(sizes);
    }
  });
  double product = 0, size = 0;
  for (int64_t chunk = 0; chunk < chunks; chunk++) {
    product += double(partial.data[chunk]);
    size += double(partial.data[chunks + chunk]);
  }
  sums[numerator] = float(product);
  sums[denominator] = float(size);
}

// d holds d, d_max, d_numerator and k, the number of steps; sums is [2, count]. Where no gradient has been anything but zero, all stay.
void prodigy_d_forward(float *d, const float *sums, int count, float beta3, float rate, float d_coef, float growth_rate,
                       int fresh) {
  double products = 0, sizes = 0;
  for (int i = 0; i < count; i++) {
    products += double(sums[i]);
    sizes += double(sums[count + i]);
  }
  const float product = float(products), size = float(sizes);
  if (!(size > 0)) return;
  const float numerator = beta3 * d[2] + rate * product, estimate = d_coef * numerator / size;
  const float now = fresh && estimate > d[0] ? estimate : d[0], most = estimate > d[1] ? estimate : d[1];
  const float grown = now * growth_rate;
  d[0] = grown < most ? grown : most;
  d[1] = most;
  d[2] = numerator;
  d[3] += 1.f;
}

template <class T>
void prodigy_forward(T *weight, float *master, const float *exp_avg, const float *exp_avg_sq, const float *d, int n,
                     float decay, float dlr, float eps, int stochastic, int seed_low, int seed_high, int stream) {
  const Weights<T> weights = weights_of(weight, master, stochastic, seed_low, seed_high, stream);
  // Until a gradient has been anything but zero, weights stay as they are: no step has been counted.
  const float least = d[0] * eps, share = d[3] > 0 ? decay : 0;
  each(n, [=](int64_t i, int64_t count) {
    const vf m = load(exp_avg + i, count), v = load(exp_avg_sq + i, count);
    const vf w = weights.read(i, count);
    // Not w (1 - decay): a decay of 1e-7 would be a fifth more.
    weights.write(i, w - (share * w + dlr * (m / (sqrt(v) + least))), count);
  });
}

EXPORT_FLOATS(prodigy_moments_forward, prodigy_moments_forward)
EXPORT(prodigy_d_forward_float32, prodigy_d_forward)
EXPORT_FLOATS(prodigy_forward, prodigy_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
