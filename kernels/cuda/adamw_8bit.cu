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

// One of the two maps: its values, ascending, and the midpoints between them as a search tree, whose node k has the nodes 2k and
// 2k + 1 below it. In ascending order a warp's lanes would ask one bank of shared memory for up to eight midpoints at once.
struct Map {
  float value[256], middle[256];
  __device__ void plant() {
    const int k = threadIdx.x;
    if (k == 0) return;
    const int level = 31 - __clz(k), at = (2 * (k - (1 << level)) + 1) * (128 >> level) - 1;
    middle[k] = 0.5f * (value[at] + value[at + 1]);
  }
};

// The numbers of the values nearest to x times `inverse`: how many midpoints lie below. Four searches go side by side, as each
// waits for shared memory at every step.
DEVICE Stored<uint8_t> nearest(const Map &map, const float (&x)[PACK], float inverse) {
  int k[PACK] = {1, 1, 1, 1};
#pragma unroll 1
  for (int level = 0; level < 8; level++)
#pragma unroll
    for (int j = 0; j < PACK; j++) k[j] = 2 * k[j] + (map.middle[k[j]] < x[j] * inverse ? 1 : 0);
  Stored<uint8_t> codes;
#pragma unroll
  for (int j = 0; j < PACK; j++) codes.at[j] = uint8_t(k[j]); // less 256
  return codes;
}

// What is not zero keeps its sign.
DEVICE Stored<uint8_t> signed_nearest(const Map &map, const float (&x)[PACK], float inverse) {
  Stored<uint8_t> codes = nearest(map, x, inverse);
#pragma unroll
  for (int j = 0; j < PACK; j++) {
    const float value = map.value[codes.at[j]], wanted = x[j] * inverse;
    if (wanted > 0 && value <= 0) codes.at[j]++;
    if (wanted < 0 && value >= 0) codes.at[j]--;
  }
  return codes;
}

// Four neighbours' codes, the first `count` of them.
DEVICE Stored<uint8_t> codes_at(const uint8_t *p, int count) {
  if (count >= PACK) return *reinterpret_cast<const Stored<uint8_t> *>(p);
  Stored<uint8_t> codes = {};
#pragma unroll
  for (int j = 0; j < PACK; j++)
    if (j < count) codes.at[j] = p[j];
  return codes;
}
DEVICE void put_codes(uint8_t *p, const Stored<uint8_t> &codes, int count) {
  if (count >= PACK) *reinterpret_cast<Stored<uint8_t> *>(p) = codes;
  else
#pragma unroll
    for (int j = 0; j < PACK; j++)
      if (j < count) p[j] = codes.at[j];
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
DEVICE void step(const Row &row, uint32_t block, const Map &map1, const Map &map2) {
  const Weights weights = weights_of(row);
  const uint32_t lane = threadIdx.x % 32;
  const float scale1 = row.absmax1[block], scale2 = row.absmax2[block];
  float m[PACKS][PACK] = {}, v[PACKS][PACK] = {}, most1 = 0, most2 = 0;
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const uint32_t i = block * BLOCK + (p * 32 + lane) * PACK;
    const int count = min(PACK, row.n - int(i));
    if (count <= 0) continue;
    const Pack g = load(row.gradient + i, count);
    const Stored<uint8_t> codes1 = codes_at(row.state1 + i, count), codes2 = codes_at(row.state2 + i, count);
    Pack w = weights.read(i, count);
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      if (j >= count) break;
      const float scaled = g.at[j] * row.gradient_scale;
      const float m0 = map1.value[codes1.at[j]] * scale1, v0 = map2.value[codes2.at[j]] * scale2;
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
    const int count = min(PACK, row.n - int(i));
    if (count <= 0) continue;
    put_codes(row.state1 + i, signed_nearest(map1, m[p], inverse1), count);
    put_codes(row.state2 + i, nearest(map2, v[p], inverse2), count);
  }
}

KERNEL(adamw_8bit_rows)(const Row *rows, const int *first_chunk, int count) {
  __shared__ Map map1, map2;
  map1.value[threadIdx.x] = signed_value(threadIdx.x);
  map2.value[threadIdx.x] = unsigned_value(threadIdx.x);
  __syncthreads();
  map1.plant();
  map2.plant();
  __syncthreads();
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int) {
    constexpr uint32_t BLOCKS = ROW_CHUNK / BLOCK;
    const uint32_t start = uint32_t(chunk) * BLOCKS, end = min(start + BLOCKS, (uint32_t(row.n) + BLOCK - 1) / BLOCK);
    for (uint32_t block = start + threadIdx.x / 32; block < end; block += THREADS / 32) step(row, block, map1, map2);
  });
}
