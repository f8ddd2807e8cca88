// One step of Schedule-Free AdamW (Defazio et al. 2024), over all parameters in one launch, in float32 but weight and gradient. What
// gradients are taken at is not kept apart: it lies between z and x, and the weight is that, rounded.
#include "optimizer.cuh"

struct ScheduleFreeRow {
  T *weight;
  const T *gradient;
  float *z, *x, *exp_avg_sq;
  int n;
  float gradient_scale, beta1, beta2, one_minus_beta2, inverse_correction2, eps, weight_decay, lr, rate;
};

KERNEL(schedule_free_rows)(const ScheduleFreeRow *rows, const int *first_chunk, int count) {
  each_row_pack(rows, first_chunk, count, [](const ScheduleFreeRow &row, uint32_t i, int count) {
    const Pack g = load(row.gradient + i, count);
    Pack z = load(row.z + i, count), x = load(row.x + i, count), v = load(row.exp_avg_sq + i, count), w;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float scaled = g.at[j] * row.gradient_scale, at = z.at[j] + row.beta1 * (x.at[j] - z.at[j]);
      v.at[j] = v.at[j] * row.beta2 + row.one_minus_beta2 * scaled * scaled;
      // Root and quotient as AdamW's.
      float root;
      asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v.at[j]));
      z.at[j] -= row.lr * (__fdividef(scaled, root * row.inverse_correction2 + row.eps) + row.weight_decay * at);
      x.at[j] += row.rate * (z.at[j] - x.at[j]);
      w.at[j] = z.at[j] + row.beta1 * (x.at[j] - z.at[j]);
    }
    store(row.exp_avg_sq + i, v, count);
    store(row.z + i, z, count);
    store(row.x + i, x, count);
    store(row.weight + i, w, count);
  });
}
