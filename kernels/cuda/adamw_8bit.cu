// One step of AdamW with moments of one byte (Dettmers et al. 2022), as kernels/cpu/adamw_8bit.cc: a warp takes a block of 256
// elements, whose largest magnitudes it finds by shuffles, so nothing is shared between warps but the two maps.
#include "optimizer.cuh"
#include "wide.cuh"

// A lane has PACKS packs of N neighbours: of the half types one, so that a block of Philox's words serves its eight weights.
constexpr int BLOCK = 256, N = WIDE<T>, PACKS = BLOCK / (32 * N);

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

// A float of 2^21 and more counts in quarters, so that its low bits are four times a small number: a word's offset in a table.
// Rounded down, and without the quarters, they are the offset of its whole part.
constexpr float QUARTERS = 2097152;
constexpr uint32_t QUARTERS_BITS = 0x4a000000;

// One of the two maps: its values, ascending, and the midpoints between them. Within a power of ten the values are evenly spaced,
// so that a line leads from a number to its code. A line is a word: its slope in the upper 22 bits, and in the lower 10, which change
// the slope by less than 2^-13 of it, its code at 0 in quarters. By the line a code is the right one or the one below it, and the
// midpoint above that says which: what a search of all midpoints finds.
struct alignas(1024) Map {
  float value[256], middle[256];
  uint32_t line[16];

  __device__ float midpoint(int k) const { return k < 255 ? 0.5f * (value[k] + value[k + 1]) : 2.f; }
  // Of level i % 8, the last twice, for 1 itself; `sign` is -1 for the negative values.
  __device__ void draw(int i, int first_parts, float sign) {
    const int level = min(i % 8, 6), parts = first_parts << level;
    float slope = parts / 0.9f;
    for (int k = level; k < 6; k++) slope *= 10;
    const float zero = first_parts == 1 ? 127 + sign * (parts * 8 / 9.f - 0.5f) : parts * 8 / 9.f - 1.5f;
    line[i] = (__float_as_uint(slope) & ~0x3ffu) | uint32_t(4 * (zero + 0.125f));
  }
};

struct Maps {
  Map first, second;
  uint32_t quarters; // QUARTERS_BITS, in memory so that it has a register: an instruction takes one constant
};

// The maps where they lie in shared memory: on a boundary of 1024 bytes, so that an offset needs no addition.
struct Places {
  uint32_t base, quarters;

  template <int FROM> __device__ float at(uint32_t address) const {
    float x;
    asm volatile("ld.shared.f32 %0, [%1+%2];" : "=f"(x) : "r"(address), "n"(FROM));
    return x;
  }
  __device__ float first(uint32_t offset) const { return at<0>(offset | base); }
  __device__ float second(uint32_t offset) const { return at<sizeof(Map)>(offset | base); }

  // `base` and four times the code of x, of [-0.988, 1] or thereabouts; lines of negative values lie 32 bytes behind the others.
  template <int MAP> __device__ uint32_t nearest(float x, uint32_t behind) const {
    float log2;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(log2) : "f"(fmaxf(fabsf(x), 1.1e-7f)));
    const uint32_t level = __float_as_uint(__fmaf_rd(log2, 0.30103f, QUARTERS + 7)) & 0x1c;
    const float line = at<MAP + 2048>(level | base | behind);
    const float zero = __uint_as_float((__float_as_uint(line) & 0x3ff) | quarters);
    const uint32_t lower = (__float_as_uint(__fmaf_rd(x, line, zero)) & 0x3fc) | base;
    return lower + (at<MAP + 1024>(lower) < x ? 4 : 0);
  }
  // A NaN has the code of the least value, as no midpoint lies below it.
  __device__ uint32_t first_nearest(float x) const {
    const float within = fminf(fmaxf(x, -0.988f), 1.f);
    return nearest<0>(within, __float_as_uint(within) >> 26 & 32);
  }
  __device__ uint32_t second_nearest(float x) const { return nearest<sizeof(Map)>(__saturatef(x), 0); }
};

// The codes of N neighbours.
struct alignas(N) Codes {
  uint32_t words[N / 4];
  // Four times code j.
  __device__ uint32_t offset(int j) const { return (j % 4 ? words[j / 4] >> (j % 4 * 8 - 2) : words[j / 4] << 2) & 0x3fc; }
};

typedef Neighbours<T, N> Own;

// The first `count` of N neighbours, the others as 0, or as `zero`, 0's code.
DEVICE Own some(const T *p, int count) {
  Own x;
#pragma unroll
  for (int k = 0; k < 4; k++) x.words[k] = 0;
#pragma unroll
  for (int j = 0; j < N; j++)
    if (j < count) {
      if constexpr (sizeof(T) == 4) x.words[j] = __float_as_uint(to_float(p[j]));
      else x.words[j / 2] |= uint32_t(*reinterpret_cast<const uint16_t *>(p + j)) << j % 2 * 16;
    }
  return x;
}
DEVICE Codes some_codes(const uint8_t *p, int count, uint32_t zero) {
  Codes codes = {};
#pragma unroll
  for (int j = 0; j < N; j++) codes.words[j / 4] |= (j < count ? p[j] : zero) << j % 4 * 8;
  return codes;
}

template <class S> DEVICE void write(S *p, int count, const float (&x)[N]) {
  if (count >= N)
#pragma unroll
    for (int k = 0; k < N; k += WIDE<S>) put_wide(p + k, x + k);
  else
#pragma unroll
    for (int j = 0; j < N; j++)
      if (j < count) p[j] = from_float<S>(x[j]);
}
// addresses: of codes in a map that lies at `base`.
DEVICE void write_codes(uint8_t *p, int count, const uint32_t (&addresses)[N], uint32_t base) {
  Codes codes;
#pragma unroll
  for (int k = 0; k < N / 4; k++) {
    const uint32_t *four = addresses + 4 * k;
    codes.words[k] = (four[0] >> 2) + four[1] * 0x40 + four[2] * 0x4000 + four[3] * 0x400000 - (base / 4) * 0x1010101;
  }
  if (count >= N) *reinterpret_cast<Codes *>(p) = codes;
  else
#pragma unroll
    for (int j = 0; j < N; j++)
      if (j < count) p[j] = uint8_t(codes.offset(j) / 4);
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

// What a step reads of N neighbours, as it lies: no load waits for another.
struct Before {
  Own gradient;
  Codes codes1, codes2;
  uint32_t weights[N]; // floats, or in the first four words T's
};

template <class S> DEVICE void take(uint32_t (&words)[N], const S *p) {
#pragma unroll
  for (int k = 0; k < N; k += WIDE<S>) {
    const Neighbours<S, WIDE<S>> in(p + k);
#pragma unroll
    for (int j = 0; j < 4; j++) words[k + j] = in.words[j];
  }
}

// Neighbours beyond a row's end have no gradient and moments of 0 (or, where a scale is none, NaN): they are no block's largest.
DEVICE Before read(const Row &row, uint32_t i) {
  const int count = row.n - int(i);
  Before x;
  if (count >= N) {
    x.gradient = Own(row.gradient + i);
    x.codes1 = *reinterpret_cast<const Codes *>(row.state1 + i);
    x.codes2 = *reinterpret_cast<const Codes *>(row.state2 + i);
    if (row.master) take(x.weights, row.master + i);
    else take(x.weights, row.weight + i);
    return x;
  }
  x.gradient = some(row.gradient + i, count);
  x.codes1 = some_codes(row.state1 + i, count, 127);
  x.codes2 = some_codes(row.state2 + i, count, 0);
  const Own old = some(row.weight + i, count);
#pragma unroll
  for (int j = 0; j < N; j++) x.weights[j] = !row.master ? old.words[j % 4] : j < count ? __float_as_uint(row.master[i + j]) : 0;
  return x;
}

// m / (sqrt(v) * row.inverse_correction2 + row.eps) by the instructions that ptxas makes of sqrtf and a division, to the bit, less
// their tests: with a branch for each, elements would go one after another. No number on the way leaves the normal ones, where v and
// m's magnitude are of [2^-90, 2^30] and the divisor of [2^-45, 2^26]. A NaN stays one.
DEVICE float quotient_of(const Row &row, float m, float v) {
  float inverse_root, inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse_root) : "f"(v));
  const float near = __fmul_rn(v, inverse_root);
  const float root = __fmaf_rn(__fmaf_rn(-near, near, v), __fmul_rn(inverse_root, 0.5f), near);
  const float divisor = __fmaf_rn(root, row.inverse_correction2, row.eps);
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
  inverse = __fmaf_rn(inverse, __fmaf_rn(-divisor, inverse, 1), inverse);
  const float quotient = __fmul_rn(m, inverse);
  return __fmaf_rn(inverse, __fmaf_rn(-divisor, quotient, m), quotient);
}

// Block `block` of a row.
DEVICE void step(const Row &row, uint32_t block, const Places &maps) {
  const Weights weights = weights_of(row);
  const bool plain = row.inverse_correction2 >= 1 && row.inverse_correction2 <= 1024 && row.eps >= 0 && row.eps <= 1;
  const uint32_t lane = threadIdx.x % 32;
  const float scale1 = row.absmax1[block], scale2 = row.absmax2[block];
  float m[PACKS][N], v[PACKS][N], most1 = 0, most2 = 0;
  Before before[PACKS];
#pragma unroll
  for (int p = 0; p < PACKS; p++) before[p] = read(row, block * BLOCK + (p * 32 + lane) * N);
#pragma unroll
  for (int p = 0; p < PACKS; p++) {
    const uint32_t i = block * BLOCK + (p * 32 + lane) * N;
    const int count = row.n - int(i);
    const Before &x = before[p];
    Own old;
#pragma unroll
    for (int k = 0; k < 4; k++) old.words[k] = x.weights[k];
    float w[N], quotient[N], least = 1;
#pragma unroll
    for (int j = 0; j < N; j++) w[j] = row.master ? __uint_as_float(x.weights[j]) : old.at(j);
#pragma unroll
    for (int j = 0; j < N; j++) {
      // What is rounded where is said, or it would hang on the storage type and on the compiler.
      const float scaled = __fmul_rn(x.gradient.at(j), row.gradient_scale);
      const float m0 = __fmul_rn(maps.first(x.codes1.offset(j)), scale1), v0 = __fmul_rn(maps.second(x.codes2.offset(j)), scale2);
      m[p][j] = __fmaf_rn(row.one_minus_beta1, __fsub_rn(scaled, m0), m0);
      v[p][j] = __fmaf_rn(scaled, __fmul_rn(row.one_minus_beta2, scaled), __fmul_rn(v0, row.beta2));
      most1 = fmaxf(most1, fabsf(m[p][j]));
      most2 = fmaxf(most2, v[p][j]);
      least = fminf(least, fminf(fabsf(m[p][j]), v[p][j]));
      quotient[j] = quotient_of(row, m[p][j], v[p][j]);
    }
    if (!(plain && least >= 0x1p-90f && fmaxf(most1, most2) <= 0x1p30f))
#pragma unroll
      for (int j = 0; j < N; j++) quotient[j] = m[p][j] / (sqrtf(v[p][j]) * row.inverse_correction2 + row.eps);
#pragma unroll
    for (int j = 0; j < N; j++) w[j] = w[j] * row.decay - row.step_size * quotient[j];
    if (weights.master) write(weights.master + i, count, w);
    weights.round(i, w);
    write(weights.weight + i, count, w);
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
    const uint32_t i = block * BLOCK + (p * 32 + lane) * N;
    const int count = row.n - int(i);
    uint32_t new1[N], new2[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
      new1[j] = maps.first_nearest(m[p][j] * inverse1);
      new2[j] = maps.second_nearest(v[p][j] * inverse2);
    }
    write_codes(row.state1 + i, count, new1, maps.base);
    write_codes(row.state2 + i, count, new2, maps.base);
  }
}

KERNEL(adamw_8bit_rows)(const Row *rows, const int *first_chunk, int count) {
  __shared__ Maps maps;
  Map &first = maps.first, &second = maps.second;
  const int k = threadIdx.x;
  first.value[k] = signed_value(k);
  second.value[k] = unsigned_value(k);
  if (k < 16) {
    first.draw(k, 1, k < 8 ? 1.f : -1.f);
    second.draw(k, 2, 1.f);
  }
  if (k == 0) maps.quarters = QUARTERS_BITS;
  __syncthreads();
  // What is not zero keeps its sign: between 0 and its neighbours there is no number.
  first.middle[k] = k == 126 ? -__uint_as_float(1) : k == 127 ? 0 : first.midpoint(k);
  second.middle[k] = second.midpoint(k);
  __syncthreads();
  const Places places = {uint32_t(__cvta_generic_to_shared(&maps)), maps.quarters};
  each_chunk(rows, first_chunk, count, [&](const Row &row, int chunk, int) {
    constexpr uint32_t BLOCKS = ROW_CHUNK / BLOCK;
    const uint32_t start = uint32_t(chunk) * BLOCKS, end = min(start + BLOCKS, (uint32_t(row.n) + BLOCK - 1) / BLOCK);
    for (uint32_t block = start + threadIdx.x / 32; block < end; block += THREADS / 32) step(row, block, places);
  });
}
