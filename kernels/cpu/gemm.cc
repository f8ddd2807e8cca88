// The packed matrix product (after BLIS, Van Zee & van de Geijn 2015). B is packed a chunk of columns at a time into panels
// [k][NR] shared by all threads; A goes a block of rows at a time into row-major panels of MR rows, private to a thread, from
// which the micro-kernel broadcasts. Both hold 32-bit words: a float, or with AVX-512 two bfloat16 neighbours along k.
#include "gemm.h"
#include "threads.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>
#if defined(ARCH_avx512) || defined(ARCH_avx2)
#include <immintrin.h>
#endif

namespace sdxl::ARCH {
namespace {

#if defined(ARCH_avx512)
constexpr int LANES = 16, MR = 14;
#elif defined(ARCH_avx2)
constexpr int LANES = 8, MR = 6;
#else
constexpr int LANES = 4, MR = 6;
#endif
constexpr int NR = 2 * LANES;
constexpr int KC = 128;           // words of k in a block
constexpr int A_STRIDE = KC + 16; // not a power of two: MR rows must not share one cache set
constexpr int TILE_COLUMNS = 512;
constexpr int TILE_PANELS = 8;
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef float loose_vec __attribute__((vector_size(LANES * 4), aligned(4)));

// ---- storage types <-> words

template <class T> constexpr int PAIR = 1;
#if defined(ARCH_avx512)
template <> constexpr int PAIR<bf16> = 2;
#endif

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return __builtin_bit_cast(float, bits);
}
inline float widen(f16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
  // Rescaling by 2^112 also makes subnormals right; infinities and NaN keep their full exponent.
  float value = __builtin_bit_cast(float, rest) * 0x1p112f;
  if ((x.bits & 0x7c00) == 0x7c00) value = __builtin_bit_cast(float, rest | 0x7f800000u);
  return __builtin_bit_cast(float, __builtin_bit_cast(uint32_t, value) | sign);
}

inline void narrow(float &y, float x) { y = x; }
inline void narrow(bf16 &y, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  y.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
inline void narrow(f16 &y, float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) half = 0x7e00;
  else if (magnitude >= 0x477ff000) half = 0x7c00;
  else if (magnitude < 0x38800000) {
    const float aligned = __builtin_bit_cast(float, magnitude) + 0.5f; // the ulp of 0.5 is the subnormal step 2^-24
    half = __builtin_bit_cast(uint32_t, aligned) - 0x3f000000;
  } else half = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
  y.bits = uint16_t(half | (bits >> 16 & 0x8000));
}

template <class T> void widen_row(float *to, const T *from, int count) {
  for (int i = 0; i < count; i++) to[i] = widen(from[i]);
}
template <class T> void narrow_row(T *to, const float *from, int count) {
  for (int i = 0; i < count; i++) narrow(to[i], from[i]);
}
#if defined(ARCH_avx512) || defined(ARCH_avx2)
template <> void widen_row<f16>(float *to, const f16 *from, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
  for (; i < count; i++) to[i] = widen(from[i]);
}
template <> void narrow_row<f16>(f16 *to, const float *from, int count) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i *>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; i++) narrow(to[i], from[i]);
}
#endif

// Elements that lie along k: `count` of them become (count + PAIR - 1) / PAIR words.
template <class T> void words_along_k(float *to, const T *from, int count) {
  if constexpr (PAIR<T> == 2) {
    if (count & 1) to[count / 2] = 0;
    memcpy(to, from, size_t(count) * 2);
  } else widen_row(to, from, count);
}

// The same for elements of one k (or of two, k and k + 1) that lie across k; an absent second row is zero.
template <class T> void words_across_k(float *to, const T *from, const T *second, int count) {
  if constexpr (PAIR<T> == 2) {
    uint32_t *words = reinterpret_cast<uint32_t *>(to);
    if (second == nullptr)
      for (int i = 0; i < count; i++) words[i] = from[i].bits;
    else
      for (int i = 0; i < count; i++) words[i] = from[i].bits | uint32_t(second[i].bits) << 16;
  } else widen_row(to, from, count);
}

typedef int lanes __attribute__((vector_size(LANES * 4)));

// Element i of the interleaved halves of two vectors: first[0] second[0] first[1] ..., from element `start` on.
template <int... I> constexpr lanes interleave(int start, std::integer_sequence<int, I...>) {
  return lanes{(start + I / 2 + I % 2 * LANES)...};
}

inline vec load_part(const float *from, int count) {
  vec value{};
  memcpy(&value, from, size_t(count) * sizeof(float));
  return value;
}

// to[c][r] = from[r][c] for one square of at most LANES x LANES: log2(LANES) perfect shuffles of the rows are a transpose.
void transpose_square(float *to, int to_stride, const float *from, int from_stride, int rows, int columns) {
  constexpr std::make_integer_sequence<int, LANES> places{};
  vec v[LANES], u[LANES];
  for (int r = 0; r < LANES; r++)
    v[r] = r >= rows ? vec{} : columns == LANES ? vec(*(const loose_vec *)(from + r * from_stride)) : load_part(from + r * from_stride, columns);
#pragma GCC unroll 4
  for (int stage = 1; stage < LANES; stage *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES / 2; i++) {
      u[2 * i] = __builtin_shuffle(v[i], v[i + LANES / 2], interleave(0, places));
      u[2 * i + 1] = __builtin_shuffle(v[i], v[i + LANES / 2], interleave(LANES / 2, places));
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) v[i] = u[i];
  }
  for (int c = 0; c < columns; c++) {
    if (rows == LANES) *(loose_vec *)(to + c * to_stride) = v[c];
    else memcpy(to + c * to_stride, &v[c], size_t(rows) * sizeof(float));
  }
}

void transpose_words(float *to, int to_stride, const float *from, int from_stride, int rows, int columns) {
  for (int c = 0; c < columns; c += LANES)
    for (int r = 0; r < rows; r += LANES)
      transpose_square(to + c * to_stride + r, to_stride, from + r * from_stride + c, from_stride, std::min(LANES, rows - r),
                       std::min(LANES, columns - c));
}

// ---- packing

constexpr int SCRATCH = 2 * KC + TILE_COLUMNS;

// Words of `lines` consecutive k-words across k, from view column `column` on, into to[line * stride].
template <class T>
void gather_across(float *to, int stride, const Rows<T> &rows, int64_t k, int64_t k_end, int64_t column, int count, int lines) {
  T first_scratch[SCRATCH], second_scratch[SCRATCH];
  for (int i = 0; i < lines; i++) {
    const int64_t r = k + int64_t(i) * PAIR<T>;
    const T *first = rows.at(r, column, count, first_scratch);
    const T *second = PAIR<T> == 2 && r + 1 < k_end ? rows.at(r + 1, column, count, second_scratch) : nullptr;
    words_across_k(to + int64_t(i) * stride, first, second, count);
  }
}

// A rows [m, m + count) at k [k, k_end) into to[count][A_STRIDE].
template <class T> void pack_a(float *to, const Operand<T> &a, int64_t m, int count, int64_t k, int64_t k_end) {
  const int words = int((k_end - k + PAIR<T> - 1) / PAIR<T>);
  if (!a.rows_are_k) {
    T scratch[SCRATCH];
    for (int i = 0; i < count; i++)
      words_along_k(to + i * A_STRIDE, a.rows.at(m + i, k, int(k_end - k), scratch), int(k_end - k));
    return;
  }
  float lines[16 * MR * TILE_PANELS];
  for (int w = 0; w < words; w += 16) {
    const int height = std::min(16, words - w);
    gather_across(lines, MR * TILE_PANELS, a.rows, k + int64_t(w) * PAIR<T>, k_end, m, count, height);
    transpose_words(to + w, A_STRIDE, lines, MR * TILE_PANELS, height, count);
  }
}

// One panel of B, columns [n, n + count), at k [k, k_end) into to[words][NR], zero beyond count.
template <class T> void pack_b(float *to, const Operand<T> &b, int64_t n, int count, int64_t k, int64_t k_end) {
  const int words = int((k_end - k + PAIR<T> - 1) / PAIR<T>);
  if (count < NR) std::fill(to, to + words * NR, 0.0f);
  if (b.rows_are_k) return gather_across(to, NR, b.rows, k, k_end, n, count, words);
  T scratch[SCRATCH];
  float lines[NR * A_STRIDE];
  for (int i = 0; i < count; i++)
    words_along_k(lines + i * A_STRIDE, b.rows.at(n + i, k, int(k_end - k), scratch), int(k_end - k));
  transpose_words(to, NR, lines, A_STRIDE, count, words);
}

// ---- micro-kernel

template <class T> inline vec multiply_add(vec sum, vec a, vec b) {
#if defined(ARCH_avx512)
  if constexpr (PAIR<T> == 2) return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#endif
  return sum + a * b;
}

// sums[ROWS][NR] (+)= a[ROWS][words] b[words][NR]
template <class T, int ROWS> void micro_kernel(float *sums, int stride, const float *a, const float *b, int words, bool add) {
  vec left[ROWS], right[ROWS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    left[i] = add ? vec(*(loose_vec *)(sums + i * stride)) : vec{};
    right[i] = add ? vec(*(loose_vec *)(sums + i * stride + LANES)) : vec{};
  }
  for (int w = 0; w < words; w++, a++, b += NR) {
    const vec b0 = *(const vec *)b, b1 = *(const vec *)(b + LANES);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++) {
      const vec x = a[i * A_STRIDE] - vec{};
      left[i] = multiply_add<T>(left[i], x, b0);
      right[i] = multiply_add<T>(right[i], x, b1);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; i++) {
    *(loose_vec *)(sums + i * stride) = left[i];
    *(loose_vec *)(sums + i * stride + LANES) = right[i];
  }
}

template <class T, int ROWS = MR>
void micro_kernel_of(int rows, float *sums, int stride, const float *a, const float *b, int words, bool add) {
  if (rows == ROWS) return micro_kernel<T, ROWS>(sums, stride, a, b, words, add);
  if constexpr (ROWS > 1) micro_kernel_of<T, ROWS - 1>(rows, sums, stride, a, b, words, add);
}

// ---- output

// e^x for x <= 88: 2^n by exponent bits times a degree 6 polynomial on |r| <= ln2 / 2 (Cephes).
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f; // rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, p) + (__builtin_bit_cast(int32_t, shifted) << 23));
}

inline float sigmoid_times(float x, float slope) { return x / (1.0f + exp_of(-slope * x)); }

// x * Phi(x) by the complementary error function of Numerical Recipes (erfcc, relative error 1.2e-7).
inline float gelu_of(float x) {
  const float z = std::fabs(x) * 0.70710678f, t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  const float tail = 0.5f * x * t * exp_of(-z * z + (p * t - 1.26551223f));
  return x > 0 ? x - tail : tail;
}

template <class T> void add_row(float *values, const T *row, int count) {
  float wide[TILE_COLUMNS];
  widen_row(wide, row, count);
  for (int i = 0; i < count; i++) values[i] += wide[i];
}

void activate(float *values, int count, int activation) {
  if (activation == SILU)
    for (int i = 0; i < count; i++) values[i] = sigmoid_times(values[i], 1.0f);
  if (activation == GELU)
    for (int i = 0; i < count; i++) values[i] = gelu_of(values[i]);
  if (activation == QUICK_GELU)
    for (int i = 0; i < count; i++) values[i] = sigmoid_times(values[i], 1.702f);
}

template <class T> void write_row(const Output<T> &c, float *values, int64_t row, int64_t column, int count) {
  if (c.bias != nullptr) add_row(values, c.bias + column, count);
  if (c.shift != nullptr) add_row(values, c.shift + row / c.rows_per_shift * c.columns + column, count);
  activate(values, count, c.activation);
  const int64_t at = row * c.columns + column;
  if (c.residual != nullptr) add_row(values, c.residual + at, count);
  narrow_row(c.y + at, values, count);
}

template <class T> void write_geglu_row(const Output<T> &c, float *values, int64_t row, int64_t column, int count) {
  for (int block = 0; block < count; block += 2 * GEGLU_BLOCK) {
    const int64_t first = (column + block) / 2;
    const int width = int(std::min<int64_t>(GEGLU_BLOCK, c.columns - first));
    float *h = values + block, *gate = h + GEGLU_BLOCK;
    if (c.bias != nullptr) {
      add_row(h, c.bias + first, width);
      add_row(gate, c.bias + c.columns + first, width);
    }
    for (int i = 0; i < width; i++) h[i] *= gelu_of(gate[i]);
    const int64_t at = row * c.columns + first;
    if (c.residual != nullptr) add_row(h, c.residual + at, width);
    narrow_row(c.y + at, h, width);
  }
}

// ---- the product

// Memory that a thread keeps between calls.
class Workspace {
public:
  float *floats(int64_t count) {
    if (count > capacity) {
      free(memory);
      capacity = (count + 1023) / 1024 * 1024;
      memory = static_cast<float *>(aligned_alloc(4096, size_t(capacity) * sizeof(float)));
      if (memory == nullptr) abort();
    }
    return memory;
  }
  ~Workspace() { free(memory); }

private:
  float *memory = nullptr;
  int64_t capacity = 0;
};

thread_local Workspace b_workspace, a_workspace, sums_workspace;

struct Range {
  int64_t begin, end;
  int count() const { return int(end - begin); }
};

// One tile of C: rows x columns, all of k. `packed` holds the chunk of B whose first column is `chunk`.
template <class T>
void compute_tile(const Output<T> &c, const Operand<T> &a, const float *packed, Range chunk, Range rows, Range columns, int64_t k) {
  const int panels = (chunk.count() + NR - 1) / NR, stride = (columns.count() + NR - 1) / NR * NR;
  float *a_panel = a_workspace.floats(int64_t(MR) * TILE_PANELS * A_STRIDE);
  float *sums = sums_workspace.floats(int64_t(MR) * TILE_PANELS * TILE_COLUMNS);
  constexpr int64_t step = KC * PAIR<T>;
  for (int64_t at = 0; at < k; at += step) {
    const int64_t end = std::min(k, at + step);
    const int words = int((end - at + PAIR<T> - 1) / PAIR<T>);
    pack_a(a_panel, a, rows.begin, rows.count(), at, end);
    const float *first = packed + (at / step * panels + (columns.begin - chunk.begin) / NR) * (KC * NR);
    for (int i = 0; i < rows.count(); i += MR)
      for (int j = 0; j < columns.count(); j += NR)
        micro_kernel_of<T>(std::min(MR, rows.count() - i), sums + int64_t(i) * stride + j, stride, a_panel + i * A_STRIDE,
                           first + j * KC, words, at > 0);
  }
  for (int i = 0; i < rows.count(); i++) {
    float *values = sums + int64_t(i) * stride;
    if (c.activation == GEGLU) write_geglu_row(c, values, rows.begin + i, columns.begin, columns.count());
    else write_row(c, values, rows.begin + i, columns.begin, columns.count());
  }
}

constexpr int THIN_ROWS = 4, THIN_COLUMNS = 64;

// A few rows times a B that lies along k: memory bound, so B is read in place, once.
template <class T> void thin_product(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int m, int64_t n, int64_t k) {
  constexpr int64_t step = KC * PAIR<T>;
  const int64_t blocks = (k + step - 1) / step;
  float *left = b_workspace.floats(blocks * THIN_ROWS * KC);
  std::fill(left, left + blocks * THIN_ROWS * KC, 0.0f);
  T scratch[SCRATCH];
  for (int64_t block = 0; block < blocks; block++)
    for (int i = 0; i < m; i++) {
      const int count = int(std::min(step, k - block * step));
      words_along_k(left + (block * THIN_ROWS + i) * KC, a.rows.at(i, block * step, count, scratch), count);
    }
  parallel_for(n, THIN_COLUMNS, [&](int64_t first, int64_t last) {
    float values[THIN_ROWS][THIN_COLUMNS];
    alignas(64) float right[KC];
    T gathered[SCRATCH];
    for (int64_t j = first; j < last; j++) {
      vec sums[THIN_ROWS][2] = {};
      for (int64_t block = 0; block < blocks; block++) {
        const int count = int(std::min(step, k - block * step)), words = (count + PAIR<T> - 1) / PAIR<T>;
        const T *row = b.rows.at(j, block * step, count, gathered);
        const float *place = reinterpret_cast<const float *>(row);
        if (sizeof(T) * PAIR<T> != sizeof(float) || count < step) {
          std::fill(right + words / (2 * LANES) * (2 * LANES), right + std::min(KC, words + 2 * LANES), 0.0f);
          words_along_k(right, row, count);
          place = right;
        }
        for (int w = 0; w < words; w += 2 * LANES)
          for (int i = 0; i < m; i++) {
            const float *l = left + (block * THIN_ROWS + i) * KC + w;
            sums[i][0] = multiply_add<T>(sums[i][0], *(const loose_vec *)l, *(const loose_vec *)(place + w));
            sums[i][1] = multiply_add<T>(sums[i][1], *(const loose_vec *)(l + LANES), *(const loose_vec *)(place + w + LANES));
          }
      }
      for (int i = 0; i < m; i++) {
        const vec both = sums[i][0] + sums[i][1];
        float total = 0;
        for (int lane = 0; lane < LANES; lane++) total += both[lane];
        values[i][j - first] = total;
      }
    }
    for (int i = 0; i < m; i++) {
      if (c.activation == GEGLU) write_geglu_row(c, values[i], i, first, int(last - first));
      else write_row(c, values[i], i, first, int(last - first));
    }
  });
}

// Columns of B to pack at once: few enough for the shared cache, many enough to pay for packing A again.
int64_t chunk_columns(int64_t n, int64_t k) {
  constexpr int64_t budget = int64_t(3) << 20;
  const int64_t fit = std::max<int64_t>(budget / std::max<int64_t>(k, 1) / TILE_COLUMNS, 0) * TILE_COLUMNS;
  return std::min<int64_t>(std::max<int64_t>(fit, 256), (n + 63) / 64 * 64);
}

} // namespace

template <class T>
void gemm(const Output<T> &c, const Operand<T> &a, const Operand<T> &b, int64_t m, int64_t n, int64_t k) {
  if (m <= THIN_ROWS && !a.rows_are_k && !b.rows_are_k) return thin_product(c, a, b, int(m), n, k);
  constexpr int64_t step = KC * PAIR<T>;
  const int64_t blocks = std::max<int64_t>((k + step - 1) / step, 1), width = chunk_columns(n, (k + PAIR<T> - 1) / PAIR<T>);
  float *packed = b_workspace.floats(blocks * KC * ((width + NR - 1) / NR * NR));
  for (int64_t begin = 0; begin < n; begin += width) {
    const Range chunk{begin, std::min(n, begin + width)};
    const int64_t panels = (chunk.count() + NR - 1) / NR;
    parallel_for(blocks * panels, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t block = i / panels, column = chunk.begin + i % panels * NR;
        pack_b(packed + i * (KC * NR), b, column, int(std::min<int64_t>(NR, chunk.end - column)), block * step, std::min(k, (block + 1) * step));
      }
    });
    const int64_t height = MR * TILE_PANELS, down = (m + height - 1) / height;
    int64_t across = TILE_COLUMNS; // narrower tiles where there are too few to share out evenly
    while (across > 2 * GEGLU_BLOCK && down * (chunk.count() / across) < 6 * thread_count()) across /= 2;
    const int64_t along = (chunk.count() + across - 1) / across;
    parallel_for(down * along, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; i++) {
        const int64_t row = i / along * height, column = chunk.begin + i % along * across;
        compute_tile(c, a, packed, chunk, {row, std::min(m, row + height)}, {column, std::min(chunk.end, column + across)}, k);
      }
    });
  }
}

template void gemm(const Output<float> &, const Operand<float> &, const Operand<float> &, int64_t, int64_t, int64_t);
template void gemm(const Output<bf16> &, const Operand<bf16> &, const Operand<bf16> &, int64_t, int64_t, int64_t);
template void gemm(const Output<f16> &, const Operand<f16> &, const Operand<f16> &, int64_t, int64_t, int64_t);

} // namespace sdxl::ARCH
