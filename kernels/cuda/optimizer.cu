// Elementwise optimizer steps, each one pass over a parameter: AdamW (Loshchilov & Hutter 2019), Lion (Chen et al. 2023),
// the moving average of weights, and the sum of squares behind global-norm clipping. State is float32, as is all
// arithmetic; what depends on the step alone comes ready from the caller, who has doubles.
#include "optimizer.cuh"

KERNEL(adamw_forward)(T *weight, float *master, const T *gradient, float *exp_avg, float *exp_avg_sq, int n, float gradient_scale,
                      float decay, float one_minus_beta1, float beta2, float one_minus_beta2, float step_size,
                      float inverse_correction2, float eps, ROUNDING) {
  const Weights weights = WEIGHTS;
  each_pack(n, [=](uint32_t i, int count) {
    const Pack g = load(gradient + i, count);
    Pack m = load(exp_avg + i, count), v = load(exp_avg_sq + i, count), w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float scaled = g.at[j] * gradient_scale;
      m.at[j] += one_minus_beta1 * (scaled - m.at[j]);
      v.at[j] = v.at[j] * beta2 + one_minus_beta2 * scaled * scaled;
      w.at[j] = w.at[j] * decay - step_size * (m.at[j] / (sqrtf(v.at[j]) * inverse_correction2 + eps));
    }
    store(exp_avg + i, m, count);
    store(exp_avg_sq + i, v, count);
    weights.write(i, w, count);
  });
}

KERNEL(lion_forward)(T *weight, float *master, const T *gradient, float *exp_avg, int n, float gradient_scale, float decay,
                     float one_minus_beta1, float one_minus_beta2, float lr, ROUNDING) {
  const Weights weights = WEIGHTS;
  each_pack(n, [=](uint32_t i, int count) {
    const Pack g = load(gradient + i, count);
    Pack m = load(exp_avg + i, count), w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float scaled = g.at[j] * gradient_scale, c = m.at[j] + one_minus_beta1 * (scaled - m.at[j]);
      m.at[j] += one_minus_beta2 * (scaled - m.at[j]);
      w.at[j] = w.at[j] * decay - lr * (c > 0.f ? 1.f : c < 0.f ? -1.f : c);
    }
    store(exp_avg + i, m, count);
    weights.write(i, w, count);
  });
}

KERNEL(ema_forward)(float *ema, const T *weight, int n, float one_minus_decay) {
  each_pack(n, [=](uint32_t i, int count) {
    Pack old = load(ema + i, count);
    const Pack now = load(weight + i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) old.at[j] -= one_minus_decay * (old.at[j] - now.at[j]);
    store(ema + i, old, count);
  });
}

// ---- the sum of squares: float32 within a chunk that depends on n alone, double over chunks

constexpr int SQUARES_CHUNK = 8192;

KERNEL(sum_squares_partial)(float *partial, const T *x, int n) {
  __shared__ float scratch[THREADS / 32];
  const uint32_t chunks = (uint32_t(n) + SQUARES_CHUNK - 1) / SQUARES_CHUNK;
  for (uint32_t chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
    const uint32_t start = chunk * SQUARES_CHUNK;
    const int count = min(uint32_t(SQUARES_CHUNK), uint32_t(n) - start);
    float total = 0;
    for (int i = threadIdx.x * PACK; i < count; i += THREADS * PACK) {
      const Pack p = load(x + start + i, count - i);
#pragma unroll
      for (int j = 0; j < PACK; j++) total += p.at[j] * p.at[j];
    }
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[chunk] = total;
    __syncthreads();
  }
}

// One block.
KERNEL(sum_squares_finish)(float *sums, const float *partial, int chunks, int index) {
  const double total = joined(partial, chunks);
  if (threadIdx.x == 0) sums[index] = float(total);
}
