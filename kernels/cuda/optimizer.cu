// Elementwise optimizer steps, each one pass over all parameters in one launch: AdamW (Loshchilov & Hutter 2019), Lion (Chen
// et al. 2023), the moving average of weights, and the sum of squares behind global-norm clipping. State is float32 (AdamW's
// moments may be bfloat16), as is all arithmetic; what depends on the step alone comes ready from the caller, who has doubles.
#include "optimizer.cuh"

// M is the moments' type.
template <class M> struct AdamwRow {
  T *weight;
  float *master;
  const T *gradient;
  M *exp_avg, *exp_avg_sq;
  int n;
  float gradient_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, eps;
  Rounding rounding;
};

// The step is taken with the new moments before they are rounded. A thread takes 16 bytes of the wider of weight and moment at a time.
template <class M> DEVICE void adamw(const AdamwRow<M> *rows, const int *first_chunk, int count) {
  constexpr int N = 16 / (sizeof(M) > sizeof(T) ? sizeof(M) : sizeof(T));
  each_row_pack<N>(rows, first_chunk, count, [](const AdamwRow<M> &row, uint32_t i, int count) {
    const Weights weights = weights_of(row);
    const Floats<N> g = load<N>(row.gradient + i, count);
    Floats<N> m = load<N>(row.exp_avg + i, count), v = load<N>(row.exp_avg_sq + i, count), w = weights.read<N>(i, count);
#pragma unroll
    for (int j = 0; j < N; j++) {
      const float scaled = g.at[j] * row.gradient_scale;
      m.at[j] += row.one_minus_beta1 * (scaled - m.at[j]);
      v.at[j] = v.at[j] * row.beta2 + row.one_minus_beta2 * scaled * scaled;
      // Root and quotient to 2^-21 of the step: exact ones branch, and with a branch for each, elements go one after another.
      float root;
      asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(v.at[j]));
      w.at[j] = w.at[j] * row.decay - row.step_size * __fdividef(m.at[j], root * row.inverse_correction2 + row.eps);
    }
    if constexpr (sizeof(M) == 2) row.rounding.moments(i, m.at, v.at);
    store(row.exp_avg + i, m, count);
    store(row.exp_avg_sq + i, v, count);
    weights.write(i, w, count);
  });
}

KERNEL(adamw_rows)(const AdamwRow<float> *rows, const int *first_chunk, int count) { adamw(rows, first_chunk, count); }

KERNEL(adamw_bf16_moments_rows)(const AdamwRow<bf16> *rows, const int *first_chunk, int count) { adamw(rows, first_chunk, count); }

struct LionRow {
  T *weight;
  float *master;
  const T *gradient;
  float *exp_avg;
  int n;
  float gradient_scale, decay, one_minus_beta1, one_minus_beta2, lr;
  Rounding rounding;
};

KERNEL(lion_rows)(const LionRow *rows, const int *first_chunk, int count) {
  each_row_pack(rows, first_chunk, count, [](const LionRow &row, uint32_t i, int count) {
    const Weights weights = weights_of(row);
    const Pack g = load(row.gradient + i, count);
    Pack m = load(row.exp_avg + i, count), w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const float scaled = g.at[j] * row.gradient_scale, c = m.at[j] + row.one_minus_beta1 * (scaled - m.at[j]);
      m.at[j] += row.one_minus_beta2 * (scaled - m.at[j]);
      w.at[j] = w.at[j] * row.decay - row.lr * (c > 0.f ? 1.f : c < 0.f ? -1.f : c);
    }
    store(row.exp_avg + i, m, count);
    weights.write(i, w, count);
  });
}

struct EmaRow {
  float *ema;
  const T *weight;
  int n;
  float one_minus_decay;
};

KERNEL(ema_rows)(const EmaRow *rows, const int *first_chunk, int count) {
  each_row_pack(rows, first_chunk, count, [](const EmaRow &row, uint32_t i, int count) {
    Pack old = load(row.ema + i, count);
    const Pack now = load(row.weight + i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) old.at[j] -= row.one_minus_decay * (old.at[j] - now.at[j]);
    store(row.ema + i, old, count);
  });
}

// ---- the sum of squares: float32 within a chunk of its tensor, double over chunks

struct SquaresRow {
  float *sums;
  const T *x;
  int n, index;
};

// partial[chunk], over the chunks of all rows.
KERNEL(sum_squares_partial)(float *partial, const SquaresRow *rows, const int *first_chunk, int count) {
  __shared__ float scratch[THREADS / 32];
  each_chunk(rows, first_chunk, count, [&](const SquaresRow &row, int chunk, int number) {
    float total = 0;
    chunk_packs(row.n, chunk, [&](uint32_t i, int count) {
      const Pack p = load(row.x + i, count);
#pragma unroll
      for (int j = 0; j < PACK; j++) total += p.at[j] * p.at[j];
    });
    total = block_sum(total, scratch);
    if (threadIdx.x == 0) partial[number] = total;
    __syncthreads();
  });
}

// A block to each row.
KERNEL(sum_squares_finish)(const float *partial, const SquaresRow *rows, const int *first_chunk, int count) {
  for (int row = blockIdx.x; row < count; row += gridDim.x) {
    const double total = joined(partial + first_chunk[row], first_chunk[row + 1] - first_chunk[row]);
    if (threadIdx.x == 0) rows[row].sums[rows[row].index] = float(total);
    __syncthreads();
  }
}
