// Attention over [n, l, heads * d], forward and backward, without storing the scores: a tile of queries meets all keys
// in blocks while a running maximum and sum are kept (FlashAttention, Dao 2022). Keys and values of a head are copied to
// float once per head and transposed where a product wants it, so that inner loops run over contiguous lanes.
#include "simd.h"
#include "threads.h"

namespace sdxl {
namespace ARCH {
namespace {

constexpr int ROWS = 4;   // queries that share one pass over a key block
constexpr int KEYS = 128; // keys per block: its scores for ROWS queries stay in L1

struct Floats {
  float *data;
  explicit Floats(int64_t count) : data(new float[size_t(count)]) {}
  ~Floats() { delete[] data; }
};

// One head of [l, heads*d] as [l, d] floats.
template <class T> void gather(float *out, const T *x, int l, int stride, int d) {
  for (int64_t i = 0; i < l; i++)
    for (int k = 0; k < d; k++) out[i * d + k] = to_float(x[i * stride + k]);
}

// One head in blocks of KEYS, each transposed to [d, KEYS]; places past l are zero.
template <class T> void gather_transposed(float *out, const T *x, int l, int stride, int d) {
  for (int64_t j0 = 0; j0 < l; j0 += KEYS)
    for (int k = 0; k < d; k++)
      for (int64_t j = 0; j < KEYS; j++)
        out[j0 * d + k * KEYS + j] = j0 + j < l ? to_float(x[(j0 + j) * stride + k]) : 0.f;
}

inline int padded(int l) { return (l + KEYS - 1) / KEYS * KEYS; }

// scores[r][j] = scale * q_r . k_j for one block of keys held as [d, KEYS].
inline void block_scores(float (*scores)[KEYS], const float *q, const float *keys, int rows, int d, float scale) {
  for (int r = 0; r < rows; r++) {
    float total[KEYS] = {0};
    for (int k = 0; k < d; k++) {
      const float factor = q[r * d + k];
      const float *lane = keys + k * KEYS;
      for (int j = 0; j < KEYS; j++) total[j] += factor * lane[j];
    }
    for (int j = 0; j < KEYS; j++) scores[r][j] = total[j] * scale;
  }
}

inline int seen_keys(int row, int lk, int causal) { return causal && row + 1 < lk ? row + 1 : lk; }

template <class T>
void attention_forward(T *y, float *lse, const T *q, const T *k, const T *v, int n, int heads, int lq, int lk, int d, int causal,
                       float scale) {
  const int stride = heads * d, tiles = (lq + ROWS - 1) / ROWS;
  const int64_t span = tiles < 16 ? tiles : (tiles + 7) / 8;
  const int64_t spans = (tiles + span - 1) / span;
  Floats keys(int64_t(n) * heads * padded(lk) * d), values(int64_t(n) * heads * lk * d);
  parallel_for(int64_t(n) * heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; h++) {
      const int64_t from = (h / heads) * lk * stride + (h % heads) * d;
      gather_transposed(keys.data + h * padded(lk) * d, k + from, lk, stride, d);
      gather(values.data + h * lk * d, v + from, lk, stride, d);
    }
  });
  parallel_for(int64_t(n) * heads * spans, 1, [&](int64_t begin, int64_t end) {
    Floats query(ROWS * d), out(ROWS * d);
    for (int64_t job = begin; job < end; job++) {
      const int64_t h = job / spans;
      const float *head_keys = keys.data + h * padded(lk) * d, *head_values = values.data + h * lk * d;
      const int64_t last = (job % spans + 1) * span < tiles ? (job % spans + 1) * span : tiles;
      for (int64_t tile = (job % spans) * span; tile < last; tile++) {
        const int first = int(tile) * ROWS, rows = lq - first < ROWS ? lq - first : ROWS;
        const int64_t at = ((h / heads) * lq + first) * int64_t(stride) + (h % heads) * d;
        gather(query.data, q + at, rows, stride, d);
        float max[ROWS], sum[ROWS] = {0};
        for (int r = 0; r < ROWS; r++) max[r] = -3e38f;
        for (int i = 0; i < ROWS * d; i++) out.data[i] = 0;
        const int most = seen_keys(first + rows - 1, lk, causal);
        for (int j0 = 0; j0 < most; j0 += KEYS) {
          float scores[ROWS][KEYS];
          block_scores(scores, query.data, head_keys + int64_t(j0) * d, rows, d, scale);
          for (int r = 0; r < rows; r++) {
            const int limit = seen_keys(first + r, lk, causal) - j0;
            const int count = limit < KEYS ? limit : KEYS;
            if (count <= 0) continue;
            float block_max = max[r];
            for (int j = 0; j < count; j++) block_max = scores[r][j] > block_max ? scores[r][j] : block_max;
            const float shrink = fast_exp(max[r] - block_max);
            max[r] = block_max;
            for (int j = 0; j < KEYS; j++) scores[r][j] = j < count ? fast_exp(scores[r][j] - block_max) : 0.f;
            float total = 0;
            for (int j = 0; j < count; j++) total += scores[r][j];
            sum[r] = sum[r] * shrink + total;
            float *acc = out.data + r * d;
            for (int c = 0; c < d; c++) acc[c] *= shrink;
            for (int j = 0; j < count; j++) {
              const float p = scores[r][j];
              const float *value = head_values + int64_t(j0 + j) * d;
              for (int c = 0; c < d; c++) acc[c] += p * value[c];
            }
          }
        }
        for (int r = 0; r < rows; r++) {
          lse[h * lq + first + r] = max[r] + logf(sum[r]);
          const float inverse = 1.f / sum[r];
          for (int c = 0; c < d; c++) y[at + int64_t(r) * stride + c] = from_float<T>(out.data[r * d + c] * inverse);
        }
      }
    }
  });
}

// One head at a time per thread: every sum runs in query order, so gradients repeat bit for bit.
template <class T>
void attention_backward(T *dq, T *dk, T *dv, const T *dy, const T *y, const float *lse, const T *q, const T *k, const T *v, int n,
                        int heads, int lq, int lk, int d, int causal, float scale) {
  const int stride = heads * d;
  parallel_for(int64_t(n) * heads, 1, [&](int64_t begin, int64_t end) {
    const int64_t pk = padded(lk);
    Floats keys_t(pk * d), values_t(pk * d), keys(int64_t(lk) * d), dkeys(int64_t(lk) * d), dvalues(int64_t(lk) * d);
    Floats row(3 * d), dquery(d);
    for (int64_t h = begin; h < end; h++) {
      const int64_t qat = (h / heads) * lq * stride + (h % heads) * d, kat = (h / heads) * lk * stride + (h % heads) * d;
      gather_transposed(keys_t.data, k + kat, lk, stride, d);
      gather_transposed(values_t.data, v + kat, lk, stride, d);
      gather(keys.data, k + kat, lk, stride, d);
      for (int64_t i = 0; i < int64_t(lk) * d; i++) dkeys.data[i] = dvalues.data[i] = 0;
      for (int i = 0; i < lq; i++) {
        const int64_t at = qat + int64_t(i) * stride;
        float *query = row.data, *grad = row.data + d, delta = 0;
        for (int c = 0; c < d; c++) {
          query[c] = to_float(q[at + c]);
          grad[c] = to_float(dy[at + c]);
          delta += grad[c] * to_float(y[at + c]);
          dquery.data[c] = 0;
        }
        const int seen = seen_keys(i, lk, causal);
        for (int j0 = 0; j0 < seen; j0 += KEYS) {
          float p[1][KEYS], dp[1][KEYS];
          block_scores(p, query, keys_t.data + int64_t(j0) * d, 1, d, scale);
          block_scores(dp, grad, values_t.data + int64_t(j0) * d, 1, d, 1.f);
          const int count = seen - j0 < KEYS ? seen - j0 : KEYS;
          for (int j = 0; j < KEYS; j++) {
            p[0][j] = fast_exp(p[0][j] - lse[h * lq + i]);
            dp[0][j] = p[0][j] * (dp[0][j] - delta) * scale;
          }
          for (int j = 0; j < count; j++) {
            const int64_t key = int64_t(j0 + j) * d;
            for (int c = 0; c < d; c++) {
              dvalues.data[key + c] += p[0][j] * grad[c];
              dkeys.data[key + c] += dp[0][j] * query[c];
              dquery.data[c] += dp[0][j] * keys.data[key + c];
            }
          }
        }
        for (int c = 0; c < d; c++) dq[at + c] = from_float<T>(dquery.data[c]);
      }
      for (int64_t j = 0; j < lk; j++)
        for (int c = 0; c < d; c++) {
          dk[kat + j * stride + c] = from_float<T>(dkeys.data[j * d + c]);
          dv[kat + j * stride + c] = from_float<T>(dvalues.data[j * d + c]);
        }
    }
  });
}

EXPORT_FLOATS(attention_forward, attention_forward)
EXPORT_FLOATS(attention_backward, attention_backward)

} // namespace
} // namespace ARCH
} // namespace sdxl
