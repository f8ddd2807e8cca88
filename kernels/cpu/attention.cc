// Attention over [n, l, heads * d], forward and backward, without storing the scores: a tile of rows meets the other side
// in blocks while a running maximum and sum are kept (FlashAttention 2, Dao 2023). Each operand of a head is packed once
// into panels of 32-bit words (a float, or with AVX-512 two bfloat16 neighbours along the summed axis) that every product
// reads from; exponentials are powers of two. Backward runs twice, over query tiles for dq and over key tiles for dk and
// dv, so that no two threads add to one gradient and its bits repeat.
#include "each.h"
#include "gemm_pack.h"

#include <algorithm>
#if defined(ARCH_avx512) || defined(ARCH_avx2)
#include <immintrin.h>
#endif

namespace sdxl {
namespace ARCH {
namespace {

#if defined(ARCH_avx512)
constexpr int VECTORS = 4;
#else
constexpr int VECTORS = 2;
#endif
constexpr int TILE_MR = 6;             // rows of a micro-tile of TILE_MR x VECTORS registers
constexpr int WIDTH = VECTORS * LANES; // columns of a panel
constexpr int ROWS = 96;               // rows of the tile that a job owns; a multiple of TILE_MR
constexpr int BLOCK = 128;             // rows of the other side per step; a multiple of WIDTH
constexpr float MASKED = -1e30f, LOG2E = 1.44269504f, LN2 = 0.69314718f;

inline vf larger(vf a, vf b) {
#if defined(ARCH_avx512)
  return vf(_mm512_max_ps(__m512(a), __m512(b)));
#elif defined(ARCH_avx2)
  return vf(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

// 2^x for x <= 127 to 2e-7 of its value (a polynomial fitted on |r| <= 1/2: Taylor's of this degree has 3e-6), or,
// `coarse`, to well under what bfloat16 keeps; 2^-126 or less may become zero.
template <bool coarse> inline vf exp2_of(vf x) {
#if defined(ARCH_avx512)
  const vf n = vf(_mm512_roundscale_ps(__m512(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  // The low bits of x + 1.5 * 2^23 are x rounded to an integer.
  x = larger(splat(-126.f), x);
  const vf shifted = x + 12582912.f, n = shifted - 12582912.f;
#endif
  const vf r = x - n;
  vf p;
  if constexpr (coarse) {
    p = r * 0.0558012f + 0.2402265f;
    p = p * r + 0.6931284f;
    p = p * r + 1.f;
  } else {
    p = r * 1.32647273e-3f + 9.67151299e-3f;
    p = p * r + 5.55073358e-2f;
    p = p * r + 2.40222424e-1f;
    p = p * r + 6.93147004e-1f;
    p = p * r + 1.f;
  }
#if defined(ARCH_avx512)
  return vf(_mm512_scalef_ps(__m512(p), __m512(n)));
#else
  return vf(vi(p) + (vi(shifted) << 23));
#endif
}

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// ---- products

// c[TILE_MR, NV * LANES] = c * factors (nothing where null) + a[TILE_MR, words] b[words, panel]
template <class T, int NV>
void micro_tile(float *c, int64_t c_stride, const float *a, int64_t a_stride, const float *b, int words, const float *factors) {
  vf sums[TILE_MR][NV];
#pragma GCC unroll 6
  for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[r][v] = factors ? load(c + r * c_stride + v * LANES) * factors[r] : vf{};
  for (int k = 0; k < words; k++) {
#pragma GCC unroll 6
    for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++)
        sums[r][v] = multiply_add<PAIR<T> == 2>(sums[r][v], splat(a[r * a_stride + k]), load(b + int64_t(k) * WIDTH + v * LANES));
  }
#pragma GCC unroll 6
  for (int r = 0; r < TILE_MR; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) store(c + r * c_stride + v * LANES, sums[r][v]);
}

struct Tile {
  float *data;
  int64_t stride;
};

// c[rows, columns] = c * factors + a b, with b in panels `panel_stride` apart. Rows run on to a multiple of TILE_MR and columns
// to one of LANES: what lies there must be readable and is overwritten.
template <class T>
void product(Tile c, Tile a, const float *b, int64_t panel_stride, int rows, int columns, int words, const float *factors) {
  for (int column = 0; column < columns; column += WIDTH, b += panel_stride) {
    const int vectors = std::min(VECTORS, (columns - column + LANES - 1) / LANES);
    for (int r = 0; r < rows; r += TILE_MR) {
      float *to = c.data + r * c.stride + column;
      const float *from = a.data + r * a.stride, *factor = factors ? factors + r : nullptr;
      if (vectors == VECTORS) micro_tile<T, VECTORS>(to, c.stride, from, a.stride, b, words, factor);
      else if (vectors == 1) micro_tile<T, 1>(to, c.stride, from, a.stride, b, words, factor);
      else if (vectors == 2) micro_tile<T, 2>(to, c.stride, from, a.stride, b, words, factor);
      else micro_tile<T, 3>(to, c.stride, from, a.stride, b, words, factor);
    }
  }
}

// ---- packing

// One side of the attention: [n, l, heads * d], seen head by head.
struct Side {
  int heads, l, d;
  int64_t stride() const { return int64_t(heads) * d; }
  int64_t at(int64_t head, int64_t row) const { return ((head / heads) * l + row) * stride() + (head % heads) * d; }
  int64_t padded() const { return round_up(l, BLOCK); }
};

template <class T> void to_words(float *to, const T *from, int count) {
  if constexpr (PAIR<T> == 2) {
    if (count & 1) to[count / 2] = 0;
    memcpy(to, from, size_t(count) * 2);
  } else
    for (int i = 0; i < count; i++) to[i] = to_float(from[i]);
}

// `rows` rows of a head as the left operand [rows, words of d], zero up to a multiple of TILE_MR.
template <class T> void pack_tile(Tile to, const T *x, const Side &side, int64_t head, int first, int rows) {
  for (int r = 0; r < rows; r++) to_words(to.data + r * to.stride, x + side.at(head, first + r), side.d);
  for (int64_t i = rows * to.stride; i < round_up(rows, TILE_MR) * to.stride; i++) to.data[i] = 0;
}

// Rows first .. first + WIDTH of a head as one panel that sums over d: [words of d][WIDTH rows], absent rows zero.
template <class T> void pack_across(float *to, const T *x, const Side &side, int64_t head, int first) {
  const int rows = std::min(WIDTH, side.l - first);
  const T *from[WIDTH];
  for (int r = 0; r < rows; r++) from[r] = x + side.at(head, first + r);
  for (int r = 0; r < WIDTH; r += LANES)
    for (int k = 0; k < side.d; k += LANES * PAIR<T>) pack_square(to + k / PAIR<T> * WIDTH + r, WIDTH, from + r, rows - r, k, side.d - k);
}

// The same rows within panels that sum over rows: [panel of d][words of rows][WIDTH of d], `panel_stride` between panels.
template <class T> void pack_along(float *to, int64_t panel_stride, const T *x, const Side &side, int64_t head, int first) {
  for (int k = 0; k < side.d; k += WIDTH, to += panel_stride) {
    const int count = std::min(WIDTH, side.d - k);
    for (int r = 0; r < WIDTH; r += PAIR<T>) {
      float *words = to + r / PAIR<T> * WIDTH;
      const T *row = first + r < side.l ? x + side.at(head, first + r) + k : nullptr;
      const T *next = PAIR<T> == 2 && first + r + 1 < side.l ? row + side.stride() : nullptr;
      for (int i = 0; i < WIDTH; i += LANES)
        store(words + i, row != nullptr && i < count ? words_across_k(row + i, next == nullptr ? next : next + i, count - i) : vf{});
    }
  }
}

// Every head of one side in panels, made by all threads. `across` panels sum over d, the others over rows.
template <class T> class Panels {
public:
  Panels(const T *x, const Side &side, int n, bool across)
      : panel(across ? words_of(side.d) * WIDTH : words_of(side.padded()) * WIDTH),
        head_size(panel * (across ? side.padded() : round_up(side.d, WIDTH)) / WIDTH), across(across),
        panels(int64_t(n) * side.heads * head_size) {
    const int64_t groups = side.padded() / WIDTH;
    parallel_for(int64_t(n) * side.heads * groups, 4, [&](int64_t begin, int64_t end) {
      for (int64_t job = begin; job < end; job++) {
        const int64_t head = job / groups;
        const int first = int(job % groups) * WIDTH;
        if (across) pack_across(panels.data + head * head_size + first / WIDTH * panel, x, side, head, first);
        else pack_along(panels.data + head * head_size + first / PAIR<T> * WIDTH, panel, x, side, head, first);
      }
    });
  }
  // Where the rows from `row` (a multiple of BLOCK) on begin; further panels lie `panel` floats apart.
  const float *from(int64_t head, int64_t row) const {
    return panels.data + head * head_size + (across ? row / WIDTH * panel : row / PAIR<T> * WIDTH);
  }
  static int64_t words_of(int64_t count) { return (count + PAIR<T> - 1) / PAIR<T>; }
  const int64_t panel;

private:
  const int64_t head_size;
  const bool across;
  Floats panels;
};

// ---- softmax

// row[0, count) as the left operand of a product: rounded to T's words in place.
template <class T> inline void round_row(float *row, int count) {
#if defined(ARCH_avx512)
  if constexpr (PAIR<T> == 2)
    for (int j = 0; j < count; j += 2 * LANES) {
      const __m512 high = j + LANES < count ? __m512(load(row + j + LANES)) : _mm512_setzero_ps();
      store(row + j / 2, vf(_mm512_cvtne2ps_pbh(high, __m512(load(row + j)))));
    }
#endif
}

inline void fill(float *row, int first, int last, float value) {
  for (int j = first; j < last; j++) row[j] = value;
}

inline float largest_of(const float *row, int count, float max) {
  vf most = splat(max);
  for (int j = 0; j < count; j += LANES) most = larger(most, load(row + j));
  return reduce_max(most);
}

// Scores become probabilities relative to exp2(offset), in units of `factor` powers of two; returns their sum.
template <class T> float probabilities(float *row, int count, float factor, float offset) {
  vf total{};
  for (int j = 0; j < count; j += LANES) {
    const vf p = exp2_of<PAIR<T> == 2>(load(row + j) * factor - offset);
    total += p;
    store(row + j, p);
  }
  round_row<T>(row, count);
  return reduce_add(total);
}

// Scores of `rows` queries and a block of `count` keys (a multiple of LANES) become probabilities relative to the running
// maxima; shrink[r] is what earlier sums of a query must be multiplied by.
template <class T> void softmax_step(Tile scores, int rows, int count, float factor, float *max, float *sum, float *shrink) {
  for (int r = 0; r < rows; r++) {
    const float next = largest_of(scores.data + r * scores.stride, count, max[r]);
    shrink[r] = (max[r] - next) * factor;
    max[r] = next;
  }
  for (int r = 0; r < rows; r += LANES) store(shrink + r, exp2_of<false>(load(shrink + r)));
  for (int r = 0; r < rows; r++)
    sum[r] = sum[r] * shrink[r] + probabilities<T>(scores.data + r * scores.stride, count, factor, max[r] * factor);
}

inline int seen_keys(int row, int lk, int causal) { return causal ? std::min(row + 1, lk) : lk; }

template <class T> struct Forward {
  T *y;
  float *lse;
  const T *q;
  const Panels<T> &keys, &values;
  Side queries;
  int lk, causal;
  float scale;
  Floats query, scores, sums;

  void tile(int64_t head, int first) {
    const int d = queries.d, rows = std::min(ROWS, queries.l - first), words = int(Panels<T>::words_of(d));
    const Tile left{query.data, words}, block{scores.data, BLOCK}, out{sums.data, round_up(d, LANES)};
    float max[ROWS], sum[ROWS] = {0}, shrink[ROWS] = {0};
    fill(max, 0, ROWS, MASKED);
    fill(out.data, 0, int(ROWS * out.stride), 0.f);
    pack_tile(left, q, queries, head, first, rows);
    const int seen = seen_keys(first + rows - 1, lk, causal);
    for (int j = 0; j < seen; j += BLOCK) {
      const int count = std::min(BLOCK, seen - j), padded = int(round_up(count, LANES));
      product<T>(block, left, keys.from(head, j), keys.panel, rows, padded, words, nullptr);
      for (int r = 0; r < rows; r++)
        fill(block.data + r * BLOCK, std::clamp(seen_keys(first + r, lk, causal) - j, 0, count), padded, MASKED);
      softmax_step<T>(block, rows, padded, scale * LOG2E, max, sum, shrink);
      product<T>(out, block, values.from(head, j), values.panel, rows, d, int(Panels<T>::words_of(count)), shrink);
    }
    for (int r = 0; r < rows; r++) {
      const float inverse = 1.f / sum[r], *row = out.data + r * out.stride;
      T *to = y + queries.at(head, first + r);
      for (int c = 0; c < d; c += LANES) store(to + c, load(row + c) * inverse, d - c);
      lse[head * queries.l + first + r] = max[r] * scale + logf(sum[r]);
    }
  }
};

// Calls body(state, head, first row) for every tile of `side`, with one `make()` state to a range of tiles.
template <class M, class F> void each_tile(const Side &side, int n, M &&make, F &&body) {
  const int64_t tiles = (side.l + ROWS - 1) / ROWS, jobs = int64_t(n) * side.heads * tiles;
  parallel_for(jobs, jobs > 64 ? 2 : 1, [&](int64_t begin, int64_t end) {
    auto state = make();
    for (int64_t job = begin; job < end; job++) body(state, job / tiles, int(job % tiles) * ROWS);
  });
}

template <class T>
void attention_forward(T *y, float *lse, const T *q, const T *k, const T *v, int n, int heads, int lq, int lk, int d, int causal,
                       float scale) {
  const Side queries{heads, lq, d}, others{heads, lk, d};
  const Panels<T> keys(k, others, n, true), values(v, others, n, false);
  const auto make = [&] {
    return Forward<T>{y, lse, q, keys, values, queries, lk, causal, scale, Floats(int64_t(ROWS) * d), Floats(ROWS * BLOCK),
                      Floats(ROWS * round_up(d, LANES))};
  };
  each_tile(queries, n, make, [](Forward<T> &forward, int64_t head, int first) { forward.tile(head, first); });
}

// ---- backward

template <class T> struct Backward {
  const T *q, *k, *v, *dy;
  const float *lse, *delta; // [n, heads, padded lq]: lse in powers of two and rowsum(dy * y); past lq, huge and zero
  Side queries, keys;
  int causal;
  float scale;
};

// Work space of one thread: two left operands, P and dS of a block, two gradients.
struct Workspace {
  Floats left, right, p, ds, first_sum, second_sum;
  explicit Workspace(int d)
      : left(int64_t(ROWS) * d), right(int64_t(ROWS) * d), p(ROWS * BLOCK), ds(ROWS * BLOCK),
        first_sum(ROWS * round_up(d, LANES)), second_sum(ROWS * round_up(d, LANES)) {}
};

template <class T> void write_rows(T *to, Tile from, const Side &side, int64_t head, int first, int rows) {
  for (int r = 0; r < rows; r++) {
    T *row = to + side.at(head, first + r);
    for (int c = 0; c < side.d; c++) row[c] = from_float<T>(from.data[r * from.stride + c]);
  }
}

// dq = scale * sum over keys of dS k, with dS = P (dy v - delta)
template <class T>
void query_gradient(T *dq, const Backward<T> &b, int n, const Panels<T> &keys_across, const Panels<T> &values_across,
                    const Panels<T> &keys_along) {
  const int d = b.queries.d, words = int(Panels<T>::words_of(d)), lk = b.keys.l;
  float ones[ROWS];
  fill(ones, 0, ROWS, 1.f);
  each_tile(b.queries, n, [&] { return Workspace(d); }, [&](Workspace &w, int64_t head, int first) {
    const int rows = std::min(ROWS, b.queries.l - first), seen = seen_keys(first + rows - 1, lk, b.causal);
    const Tile query{w.left.data, words}, grad{w.right.data, words}, p{w.p.data, BLOCK}, ds{w.ds.data, BLOCK};
    const Tile out{w.first_sum.data, round_up(d, LANES)};
    pack_tile(query, b.q, b.queries, head, first, rows);
    pack_tile(grad, b.dy, b.queries, head, first, rows);
    fill(out.data, 0, int(ROWS * out.stride), 0.f);
    for (int j = 0; j < seen; j += BLOCK) {
      const int count = std::min(BLOCK, seen - j), padded = int(round_up(count, LANES));
      product<T>(p, query, keys_across.from(head, j), keys_across.panel, rows, padded, words, nullptr);
      product<T>(ds, grad, values_across.from(head, j), values_across.panel, rows, padded, words, nullptr);
      for (int r = 0; r < rows; r++) {
        float *score = p.data + r * BLOCK, *row = ds.data + r * BLOCK;
        const int64_t at = head * b.queries.padded() + first + r;
        fill(score, std::clamp(seen_keys(first + r, lk, b.causal) - j, 0, count), padded, MASKED);
        for (int i = 0; i < padded; i += LANES)
          store(row + i, exp2_of<false>(load(score + i) * (b.scale * LOG2E) - b.lse[at]) * (load(row + i) - b.delta[at]) * b.scale);
        round_row<T>(row, padded);
      }
      product<T>(out, ds, keys_along.from(head, j), keys_along.panel, rows, d, int(Panels<T>::words_of(count)), ones);
    }
    write_rows(dq, out, b.queries, head, first, rows);
  });
}

// dv = sum over queries of P dy, dk = scale * sum of dS q: the same scores with keys as rows.
template <class T>
void key_gradients(T *dk, T *dv, const Backward<T> &b, int n, const Panels<T> &queries_across, const Panels<T> &grads_across,
                   const Panels<T> &queries_along, const Panels<T> &grads_along) {
  const int d = b.keys.d, words = int(Panels<T>::words_of(d)), lq = b.queries.l;
  float ones[ROWS];
  fill(ones, 0, ROWS, 1.f);
  each_tile(b.keys, n, [&] { return Workspace(d); }, [&](Workspace &w, int64_t head, int first) {
    const int rows = std::min(ROWS, b.keys.l - first);
    const Tile key{w.left.data, words}, value{w.right.data, words}, p{w.p.data, BLOCK}, ds{w.ds.data, BLOCK};
    const Tile dkey{w.first_sum.data, round_up(d, LANES)}, dvalue{w.second_sum.data, round_up(d, LANES)};
    pack_tile(key, b.k, b.keys, head, first, rows);
    pack_tile(value, b.v, b.keys, head, first, rows);
    fill(dkey.data, 0, int(ROWS * dkey.stride), 0.f);
    fill(dvalue.data, 0, int(ROWS * dvalue.stride), 0.f);
    for (int i = b.causal ? first / BLOCK * BLOCK : 0; i < lq; i += BLOCK) {
      const int count = std::min(BLOCK, lq - i), padded = int(round_up(count, LANES));
      const float *lse = b.lse + head * b.queries.padded() + i, *delta = b.delta + head * b.queries.padded() + i;
      product<T>(p, key, queries_across.from(head, i), queries_across.panel, rows, padded, words, nullptr);
      product<T>(ds, value, grads_across.from(head, i), grads_across.panel, rows, padded, words, nullptr);
      for (int r = 0; r < rows; r++) {
        float *score = p.data + r * BLOCK, *row = ds.data + r * BLOCK;
        if (b.causal) fill(score, 0, std::clamp(first + r - i, 0, padded), MASKED);
        for (int c = 0; c < padded; c += LANES) {
          const vf probability = exp2_of<false>(load(score + c) * (b.scale * LOG2E) - load(lse + c));
          store(score + c, probability);
          store(row + c, probability * (load(row + c) - load(delta + c)) * b.scale);
        }
        round_row<T>(score, padded);
        round_row<T>(row, padded);
      }
      const int summed = int(Panels<T>::words_of(count));
      product<T>(dvalue, p, grads_along.from(head, i), grads_along.panel, rows, d, summed, ones);
      product<T>(dkey, ds, queries_along.from(head, i), queries_along.panel, rows, d, summed, ones);
    }
    write_rows(dk, dkey, b.keys, head, first, rows);
    write_rows(dv, dvalue, b.keys, head, first, rows);
  });
}

template <class T>
void attention_backward(T *dq, T *dk, T *dv, const T *dy, const T *y, const float *lse, const T *q, const T *k, const T *v, int n,
                        int heads, int lq, int lk, int d, int causal, float scale) {
  const Side queries{heads, lq, d}, keys{heads, lk, d};
  const int64_t padded = queries.padded();
  Floats lse2(int64_t(n) * heads * padded), delta(int64_t(n) * heads * padded);
  parallel_for(int64_t(n) * heads * padded, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t head = i / padded, row = i % padded, at = queries.at(head, row);
      float total = 0;
      for (int c = 0; c < d && row < lq; c++) total += to_float(dy[at + c]) * to_float(y[at + c]);
      lse2.data[i] = row < lq ? lse[head * lq + row] * LOG2E : -MASKED;
      delta.data[i] = total;
    }
  });
  const Backward<T> b{q, k, v, dy, lse2.data, delta.data, queries, keys, causal, scale};
  {
    const Panels<T> keys_across(k, keys, n, true), values_across(v, keys, n, true), keys_along(k, keys, n, false);
    query_gradient(dq, b, n, keys_across, values_across, keys_along);
  }
  const Panels<T> queries_across(q, queries, n, true), grads_across(dy, queries, n, true);
  const Panels<T> queries_along(q, queries, n, false), grads_along(dy, queries, n, false);
  key_gradients(dk, dv, b, n, queries_across, grads_across, queries_along, grads_along);
}

EXPORT_FLOATS(attention_forward, attention_forward)
EXPORT_FLOATS(attention_backward, attention_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
