// One step of Schedule-Free AdamW (Defazio et al. 2024), all in float32 but weight and gradient. What gradients are taken at is not kept
// apart: it lies between z and x, and the weight is that, rounded.
#include "each.h"

namespace sdxl {
namespace ARCH {
namespace {

template <class T>
void schedule_free_forward(T *weight, const T *gradient, float *z, float *x, float *exp_avg_sq, int n, float gradient_scale,
                           float beta1, float beta2, float one_minus_beta2, float inverse_correction2, float eps,
                           float weight_decay, float lr, float rate) {
  each(n, [=](int64_t i, int64_t count) {
    const vf g = load(gradient + i, count) * gradient_scale;
    const vf v = load(exp_avg_sq + i, count) * beta2 + one_minus_beta2 * g * g;
    const vf from = load(z + i, count), mean = load(x + i, count);
    const vf at = from + beta1 * (mean - from);
    const vf moved = from - lr * (g / (sqrt(v) * inverse_correction2 + eps) + weight_decay * at);
    const vf next = mean + rate * (moved - mean);
    store(exp_avg_sq + i, v, count);
    store(z + i, moved, count);
    store(x + i, next, count);
    store(weight + i, moved + beta1 * (next - moved), count);
  });
}

EXPORT_FLOATS(schedule_free_forward, schedule_free_forward)

} // namespace
} // namespace ARCH
} // namespace sdxl
