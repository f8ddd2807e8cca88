// The products of linear layers and matmul, in each pairing of layouts, and the kernel that joins split sums. The entries
// are chosen by engine/cuda/plan_matrix.ts: "nt" has A as [m, k] and B as [n, k], "nn" has B as [k, n], "tn" A as [k, m] too.
#include "gemm.cuh"

// What every entry takes: the result and its epilogue, the operands, sizes, row strides, and batches: z / splits = outer *
// inner_batches + inner, with a stride each for A, B and Y. `half`: see Weight. `whole`: bit 0 A, bit 1 B.
#define PARAMETERS \
  T *y, float *partial, const T *a, const T *b, const T *bias, const T *shift, const T *residual, int m, int n, int k, int a_stride, \
      int b_stride, int columns, int y_stride, int inner_batches, int a_outer, int a_inner, int b_outer, int b_inner, int y_outer, \
      int y_inner, int rows_per_shift, int activation, int half, int splits, int k_part, int whole

#define GEMM(name, S, A_ALONG, B_ALONG, ACTIVE, BView, ...) \
  KERNEL_OF(S::COUNT, gemm_##name)(PARAMETERS) { \
    const int batch = blockIdx.z / splits, outer = batch / inner_batches, inner = batch % inner_batches; \
    const int64_t to = int64_t(outer) * y_outer + int64_t(inner) * y_inner; \
    const Output out = {y + to, partial, bias, shift, residual, columns, y_stride, rows_per_shift, activation}; \
    const Matrix left = {a + int64_t(outer) * a_outer + int64_t(inner) * a_inner, A_ALONG ? m : k, A_ALONG ? k : m, a_stride}; \
    const BView right = {{b + int64_t(outer) * b_outer + int64_t(inner) * b_inner, B_ALONG ? n : k, B_ALONG ? k : n, b_stride} __VA_ARGS__}; \
    gemm<S, A_ALONG, B_ALONG, ACTIVE>(out, left, right, Problem{m, n, k, splits, k_part}, whole & 1, whole & 2); \
  }

struct Plain : Matrix {};

GEMM(nt_small, Small, true, true, true, Weight, , half)
GEMM(nn_small, Small, true, false, false, Plain)
GEMM(tn_small, Small, false, false, false, Plain)
#if !defined(T_FLOAT32)
GEMM(nt_large, Large, true, true, true, Weight, , half)
GEMM(nn_large, Large, true, false, false, Plain)
GEMM(tn_large, Large, false, false, false, Plain)
#endif

// y = the epilogue of the sum over splits, in order, of partial[split][m][n].
template <int WIDTH> DEVICE void join(const Output &out, const float *partial, int m, int n, int splits) {
  const uint32_t across = n / WIDTH;
  for (uint32_t job = blockIdx.x * blockDim.x + threadIdx.x; job < m * across; job += gridDim.x * blockDim.x) {
    const int row = job / across, column = job % across * WIDTH;
    const float *from = partial + int64_t(row) * n + column;
    Few<WIDTH> total = load_few<WIDTH>(from);
#pragma unroll 2
    for (int split = 1; split < splits; split++) {
      const Few<WIDTH> more = load_few<WIDTH>(from + int64_t(split) * m * n);
#pragma unroll
      for (int j = 0; j < WIDTH; j++) total.at[j] += more.at[j];
    }
    write_few<true>(out, total, total, row, column);
  }
}

KERNEL(gemm_join)(T *y, const float *partial, const T *bias, const T *shift, const T *residual, int m, int n, int rows_per_shift,
                  int activation, int splits) {
  const Output out = {y, nullptr, bias, shift, residual, n, n, rows_per_shift, activation};
  if (n % PACK == 0) join<PACK>(out, partial, m, n, splits);
  else join<1>(out, partial, m, n, splits);
}

#if defined(T_FLOAT32)
// x's rows as two of bfloat16 each, hi = bf16(x) and behind it lo = bf16(x - hi), for products on Hopper (product_sm90.cuh).
// What would round to infinity is cut off instead, and lo has the rest. `inner` is whole packs.
KERNEL(gemm_split)(bf16 *y, const T *x, int rows, int inner) {
  each_pack(rows * inner, [=](uint32_t i, int) {
    const uint32_t row = i / inner;
    const Pack whole = load(x + i, PACK);
    Pack hi, lo;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const uint32_t bits = __float_as_uint(whole.at[j]), size = bits & 0x7fffffffu;
      const bool rounds_to_infinity = size > 0x7f7f0000u && size < 0x7f800000u;
      hi.at[j] = rounds_to_infinity ? __uint_as_float(bits & 0xffff0000u) : to_float(from_float<bf16>(whole.at[j]));
      lo.at[j] = whole.at[j] - hi.at[j];
    }
    bf16 *to = y + int64_t(i) + int64_t(row) * inner;
    store(to, hi, PACK);
    store(to + inner, lo, PACK);
  });
}
#endif
