// One step of AdamW with moments of one byte (Dettmers et al. 2022), as kernels/cpu/adamw_8bit.cc: a warp takes a block of 256
// elements, whose largest magnitudes it finds by shuffles, so nothing is shared between warps but the two maps.
#include "optimizer.cuh"

constexpr int BLOCK = 256, PACKS = BLOCK / (32 * PACK);

// 10^(level - 6) times the centre of part k of `parts` equal parts of [0.1, 1].
DEVICE float centre(int level, int k, int parts) {
  double scale = 1;
  for (int i = level; i < 6; i++) scale = __dmul_rn(scale, 0.1);
  return float(__dmul_rn(scale, __dadd_rn(0.1, __dmul_rn(__dmul_rn(0.9, k + 0.5), 1.0 / parts))));
}

// Ascending: the negative values, 0, the positive ones, 1.
DEVICE float signed_value(int at) {
  if (at == 127) return 0;
  if (at == 255) return 1;
  const int rank = at > 127 ? at - 127 : 127 - at, level = 31 - __clz(rank);
  const float value = centre(level, rank - (1 << level), 1 << level);
  return at > 127 ? value : -value;
}

DEVICE float unsigned_value(int at) {
  if (at == 0 || at == 255) return at ? 1 : 0;
  const int level = 30 - __clz(at + 1), parts = 2 << level;
  return centre(level, at + 1 - parts, parts);
}

// The nearest value's number: how many midpoints lie below x. Not unrolled, as sixteen copies of it would be most of the PTX.
DEVICE int nearest(const float *map, float x) {
  int at = 0;
#pragma unroll 1
  for (int half = 128; half > 0; half /= 2)
    if (0.5f * (map[at + half - 1] + map[at + half]) < x) at += half;
  return at;
}

// What is not zero keeps its sign.
DEVICE int signed_nearest(const float *map, float x) {
  const int code = nearest(map, x);
  if (x > 0 && map[code] <= 0) return code + 1;
  return x < 0 && map[code] >= 0 ? code - 1 : code;
}

struct Row {
  T *weight;
  float *master;
  const T *gradient;
  uint8_t *state1, *state2;
  float *absmax1, *absmax2;
  int n;
  float gradient_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_correction2, eps;
  Rounding rounding;
};

// Block `block` of a row.
DEVICE void step(const Row &row, uint32_t block, const float *map1, const float *map2) {
  const Weights weights = weights_of(row);
  const uint32_t lane = threadIdx.x % 32;
  const float scale1 = row.absmax1[block], scale2 = row.absmax2[block];
  float m[PACKS][PACK], v[PACKS][PACK], most1 = 0, most2 = 0;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const uint32_t i = block * BLOCK + (p * 32 + lane) * PACK;
    const int count = min(PACK, row.n - int(i));
    if (count <= 0) continue;
    const Pack g = load(row.gradient + i, count);
    Pack w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      if (j >= count) break;
      const float scaled = g.at[j] * row.gradient_scale;
      const float m0 = map1[row.state1[i + j]] * scale1, v0 = map2[row.state2[i + j]] * scale2;
      m[p][j] = m0 + row.one_minus_beta1 * (scaled - m0);
      v[p][j] = v0 * row.beta2 + row.one_minus_beta2 * scaled * scaled;
      most1 = fmaxf(most1, fabsf(m[p][j]));
      most2 = fmaxf(most2, v[p][j]);
      w.at[j] = w.at[j] * row.decay - row.step_size * (m[p][j] / (sqrtf(v[p][j]) * row.inverse_correction2 + row.eps));
    }
    weights.write(i, w, count);
  }
  most1 = warp_max(most1);
  most2 = warp_max(most2);
  __syncwarp();
  if (lane == 0) {
    row.absmax1[block] = most1;
    row.absmax2[block] = most2;
  }
  const float inverse1 = most1 > 0 ? 1.f / most1 : 0.f, inverse2 = most2 > 0 ? 1.f / most2 : 0.f;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const uint32_t i = block * BLOCK + (p * 32 + lane) * PACK;
#pragma unroll
    for (int j = 0; j < PACK; j++)
      if (int(i) + j < row.n) {
        row.state1[i + j] = uint8_t(signed_nearest(map1, m[p][j] * inverse1));
        row.state2[i + j] = uint8_t(nearest(map2, v[p][j] * inverse2));
      }
  }
}

KERNEL(adamw_8bit_rows)(const Row *rows, const int *first_chunk, int count) {
  __shared__ float map1[256], map2[256];
  map1[threadIdx.x] = signed_value(threadIdx.x);
  map2[threadIdx.x] = unsigned_value(threadIdx.x);
  __syncthreads();
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int) {
    constexpr uint32_t BLOCKS = ROW_CHUNK / BLOCK;
    const uint32_t start = uint32_t(chunk) * BLOCKS, end = min(start + BLOCKS, (uint32_t(row.n) + BLOCK - 1) / BLOCK);
    for (uint32_t block = start + threadIdx.x / 32; block < end; block += THREADS / 32) step(row, block, map1, map2);
  });
}
