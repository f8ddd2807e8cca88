// c[m, n] float32 = a[m, k] b[k, n], both bfloat16: 64 x 64 x 32 tiles, four warps, two stages of cp.async, ldmatrix and
// mma.sync m16n8k16. The kernel of the tests for asynchronous copies and tensor cores.
#include <cstdint>
#include <cuda_bf16.h>

constexpr int BM = 64, BN = 64, BK = 32, LDA = BK + 8, LDB = BN + 8;

static __device__ void copy16(uint32_t to, const void *from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0));
}

static __device__ void load4(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

static __device__ void load4_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}

static __device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(128)
    hgemm(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *c, int m, int n, int k) {
  __shared__ __align__(16) __nv_bfloat16 sa[2][BM * LDA], sb[2][BK * LDB];
  const int t = threadIdx.x, lane = t & 31, warp = t >> 5;
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN;
  const uint32_t a0 = __cvta_generic_to_shared(sa), b0 = __cvta_generic_to_shared(sb);
  auto load = [&](int stage, int k0) {
    for (int i = 0; i < 2; i++) {
      const int chunk = t + i * 128, row = chunk / 4, column = chunk % 4 * 8;
      const bool inside = m0 + row < m && k0 + column < k;
      copy16(a0 + (stage * BM * LDA + row * LDA + column) * 2, inside ? a + (m0 + row) * k + k0 + column : a, inside);
    }
    for (int i = 0; i < 2; i++) {
      const int chunk = t + i * 128, row = chunk / 8, column = chunk % 8 * 8;
      const bool inside = k0 + row < k && n0 + column < n;
      copy16(b0 + (stage * BK * LDB + row * LDB + column) * 2, inside ? b + (k0 + row) * n + n0 + column : b, inside);
    }
    asm volatile("cp.async.commit_group;");
  };
  float sum[8][4] = {};
  const int steps = (k + BK - 1) / BK;
  load(0, 0);
  for (int step = 0; step < steps; step++) {
    if (step + 1 < steps) load((step + 1) & 1, (step + 1) * BK);
    else asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    const uint32_t as = a0 + (step & 1) * BM * LDA * 2, bs = b0 + (step & 1) * BK * LDB * 2;
    for (int q = 0; q < BK; q += 16) {
      uint32_t fa[4], fb[4];
      load4(fa, as + ((warp * 16 + (lane & 15)) * LDA + q + (lane >> 4) * 8) * 2);
      for (int j = 0; j < 4; j++) {
        load4_transposed(fb, bs + ((q + (lane & 15)) * LDB + j * 16 + (lane >> 4) * 8) * 2);
        multiply(sum[2 * j], fa, fb[0], fb[1]);
        multiply(sum[2 * j + 1], fa, fb[2], fb[3]);
      }
    }
    __syncthreads();
  }
  for (int j = 0; j < 8; j++) {
    const int row = m0 + warp * 16 + lane / 4, column = n0 + j * 8 + lane % 4 * 2;
    if (column >= n) continue;
    if (row < m) *reinterpret_cast<float2 *>(c + row * n + column) = make_float2(sum[j][0], sum[j][1]);
    if (row + 8 < m) *reinterpret_cast<float2 *>(c + (row + 8) * n + column) = make_float2(sum[j][2], sum[j][3]);
  }
}
