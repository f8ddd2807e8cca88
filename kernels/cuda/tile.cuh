// Building blocks of the matrix kernels: asynchronous copies into shared memory, ldmatrix and mma.sync fragments.
// A shared tile is rows of 16-byte chunks, whose places are permuted within a row by the row's number, so that neither the
// copies nor ldmatrix meet bank conflicts.
#pragma once
#include "common.cuh"

// 2^x to two units in the last place; subnormal results become zero.
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float fast_reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Elements of a chunk.
constexpr int CHUNK = 16 / sizeof(T);

DEVICE uint32_t shared_address(const void *p) { return uint32_t(__cvta_generic_to_shared(p)); }

// 16 bytes to `to` in shared memory; zeros where `present` is false, and then `from` is any valid address.
DEVICE void copy_async(uint32_t to, const T *from, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(present ? 16 : 0) : "memory");
}
DEVICE void put_shared(uint32_t to, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(x) : "memory"); }
template <class Half> DEVICE void put_shared(uint32_t to, Half x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(x.bits) : "memory");
}
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of the newest groups are still on their way.
template <int pending> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory"); }

// Byte offset of a chunk in a tile whose rows hold `chunks` of them.
template <int chunks> DEVICE uint32_t tile_offset(int row, int chunk) {
  static_assert(chunks == 4 || chunks >= 8, "rows of 64 bytes, or of a multiple of 128");
  const int turned = chunks == 4 ? chunk ^ ((row >> 1) & 3) : chunk ^ (row & 7);
  return uint32_t(row * chunks + turned) * 16;
}

// Four 8 x 8 matrices of 16-bit elements: lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
DEVICE void load_matrices_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8]; lane l holds d at rows l / 4 (d[0], d[1]) and l / 4 + 8, columns 2 (l % 4) and one on.
DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(T_BFLOAT16)
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two floats rounded to neighbours in storage, `low` first.
DEVICE uint32_t round_pair(float low, float high) {
  uint32_t pair;
#if defined(T_BFLOAT16)
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
#else
  const uint32_t first = from_float<f16>(low).bits, second = from_float<f16>(high).bits;
  pair = first | second << 16;
#endif
  return pair;
}

// Over the four lanes that share a row of d.
DEVICE float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Fragments of a from a tile [m][k]: 16 rows from `m`, 16 columns from `k`.
template <int chunks> DEVICE void load_a(uint32_t (&a)[4], uint32_t tile, int m, int k, int lane) {
  load_matrices(a, tile + tile_offset<chunks>(m + lane % 16, k / 8 + lane / 16));
}
// The same from a tile [k][m].
template <int chunks> DEVICE void load_a_turned(uint32_t (&a)[4], uint32_t tile, int m, int k, int lane) {
  load_matrices_transposed(a, tile + tile_offset<chunks>(k + lane % 8 + lane / 16 * 8, m / 8 + lane / 8 % 2));
}
// Fragments of b for 16 columns from `n` (b[0], b[1] the first eight), from a tile [n][k].
template <int chunks> DEVICE void load_b(uint32_t (&b)[4], uint32_t tile, int n, int k, int lane) {
  load_matrices(b, tile + tile_offset<chunks>(n + lane % 8 + lane / 16 * 8, k / 8 + lane / 8 % 2));
}
// The same from a tile [k][n].
template <int chunks> DEVICE void load_b_turned(uint32_t (&b)[4], uint32_t tile, int n, int k, int lane) {
  load_matrices_transposed(b, tile + tile_offset<chunks>(k + lane % 16, n / 8 + lane / 16));
}
