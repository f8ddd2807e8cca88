// One step of Prodigy (Mishchenko & Defazio 2023), each of its passes over all parameters in one launch: moments with every parameter's
// part of the two sums that d is made of, then d, then weights. Sums are float32 within a chunk of a tensor, double over chunks.
#include "optimizer.cuh"

struct MomentsRow {
  const T *weight;
  const float *master;
  const T *gradient, *p0;
  float *exp_avg, *exp_avg_sq, *s, *sums;
  int n, numerator, denominator;
  float gradient_scale, beta1, beta2, beta3, rate1, rate2, rate3;
};

// Over the chunks of all rows, partial [2, chunks]: the sums of g (p0 - w), and of |s| as it is after the step.
KERNEL(prodigy_moments_partial)(float *partial, const MomentsRow *rows, const int *first_chunk, int count) {
  __shared__ float scratch[2][THREADS / 32]; // each is free again after the other's barrier
  each_chunk(rows, first_chunk, count, [&](const MomentsRow &row, int chunk, int number) {
    float product = 0, size = 0;
    chunk_packs(row.n, chunk, [&](uint32_t i, int count) {
      const Pack g = load(row.gradient + i, count), p0 = load(row.p0 + i, count);
      const Pack w = row.master ? load(row.master + i, count) : load(row.weight + i, count);
      Pack m = load(row.exp_avg + i, count), v = load(row.exp_avg_sq + i, count), s = load(row.s + i, count);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float scaled = g.at[j] * row.gradient_scale;
        product += scaled * (p0.at[j] - w.at[j]);
        m.at[j] = m.at[j] * row.beta1 + row.rate1 * scaled;
        v.at[j] = v.at[j] * row.beta2 + row.rate2 * scaled * scaled;
        s.at[j] = s.at[j] * row.beta3 + row.rate3 * scaled;
        size += fabsf(s.at[j]);
      }
      store(row.exp_avg + i, m, count);
      store(row.exp_avg_sq + i, v, count);
      store(row.s + i, s, count);
    });
    product = block_sum(product, scratch[0]);
    size = block_sum(size, scratch[1]);
    if (threadIdx.x == 0) {
      partial[number] = product;
      partial[first_chunk[count] + number] = size;
    }
  });
}

// A block to each row and sum.
KERNEL(prodigy_moments_finish)(const float *partial, const MomentsRow *rows, const int *first_chunk, int count) {
  for (int job = blockIdx.x; job < 2 * count; job += gridDim.x) {
    const bool second = job >= count;
    const int row = second ? job - count : job;
    const float *own = partial + (second ? first_chunk[count] : 0) + first_chunk[row];
    const double total = joined(own, first_chunk[row + 1] - first_chunk[row]);
    if (threadIdx.x == 0) rows[row].sums[second ? rows[row].denominator : rows[row].numerator] = float(total);
    __syncthreads();
  }
}

#if defined(T_FLOAT32)
// One block. d holds d, d_max, d_numerator and k, the number of steps; sums is [2, count]. Where no gradient has been anything but
// zero, all stay.
KERNEL(prodigy_d_forward)(float *d, const float *sums, int count, float beta3, float rate, float d_coef, float growth_rate, int fresh) {
  const float product = float(joined(sums, count));
  __syncthreads();
  const float size = float(joined(sums + count, count));
  if (threadIdx.x > 0 || !(size > 0)) return;
  const float numerator = beta3 * d[2] + rate * product, estimate = d_coef * numerator / size;
  const float now = fresh ? fmaxf(d[0], estimate) : d[0], most = fmaxf(d[1], estimate);
  d[0] = fminf(most, now * growth_rate);
  d[1] = most;
  d[2] = numerator;
  d[3] += 1.f;
}
#endif

struct ProdigyRow {
  T *weight;
  float *master;
  const float *exp_avg, *exp_avg_sq, *d;
  int n;
  float decay, dlr, eps;
  Rounding rounding;
};

KERNEL(prodigy_rows)(const ProdigyRow *rows, const int *first_chunk, int count) {
  each_row_pack(rows, first_chunk, count, [](const ProdigyRow &row, uint32_t i, int count) {
    const Weights weights = weights_of(row);
    const Pack m = load(row.exp_avg + i, count), v = load(row.exp_avg_sq + i, count);
    // Until a gradient has been anything but zero, weights stay as they are.
    const float least = row.d[0] * row.eps, decay = row.d[3] > 0 ? row.decay : 0;
    Pack w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) w.at[j] -= decay * w.at[j] + row.dlr * (m.at[j] / (sqrtf(v.at[j]) + least));
    weights.write(i, w, count);
  });
}
