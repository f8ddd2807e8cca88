// What sm_90a adds: TMA, mbarriers, wgmma. A warp-specialised matrix product, a small one whose operands the threads write
// themselves, a load of convolution pixels (im2col), and cp.async that signals an mbarrier. `flags` plants faults that
// taking an instruction out of the PTX cannot: 1 leaves dynamic shared memory unaligned, 2 frees a stage too early,
// 4 announces too many bytes.
#include <cstdint>
#include <cuda.h>
#include <cuda_bf16.h>

constexpr int BM = 128, BN = 64, BK = 64, STAGES = 3;
constexpr uint32_t BYTES_A = BM * BK * 2, BYTES_B = BN * BK * 2;

static __device__ uint32_t shared_address(const void *p) { return __cvta_generic_to_shared(p); }

static __device__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
static __device__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
static __device__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
static __device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
static __device__ void load_box(uint32_t to, const CUtensorMap *map, uint32_t barrier, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// K-major operands in rows of 128 bytes, swizzled, eight rows to 1024 bytes.
static __device__ uint64_t descriptor(uint32_t a) {
  return (uint64_t)((a & 0x3FFFF) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}
static __device__ bool elect() {
  uint32_t leader;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(leader));
  return leader;
}
static __device__ void fence_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

static __device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, %32, %33, 1, 1, 1, 0, 0;"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

// d[m, n] = a[m, k] b[n, k]^T: one producer warpgroup, two consumers of 64 rows each.
extern "C" __global__ void __launch_bounds__(384, 1)
    wgemm(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, float *d, int m, int n,
          int k, int flags) {
  extern __shared__ __align__(1024) uint8_t raw[];
  uint32_t base = shared_address(raw);
  if (!(flags & 1)) base = (base + 1023) & ~1023u;
  __shared__ __align__(8) uint64_t full[STAGES], empty[STAGES];
  const int t = threadIdx.x, group = t >> 7, m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, steps = (k + BK - 1) / BK;
  if (t == 0) {
    for (int s = 0; s < STAGES; s++) {
      barrier_init(shared_address(&full[s]), 1);
      barrier_init(shared_address(&empty[s]), 256);
    }
    fence_proxy();
  }
  __syncthreads();
  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (t < 32 && elect()) {
      for (int step = 0; step < steps; step++) {
        const int s = step % STAGES, phase = step / STAGES & 1;
        barrier_wait(shared_address(&empty[s]), phase ^ 1);
        barrier_expect(shared_address(&full[s]), BYTES_A + BYTES_B + (flags & 4 ? 16 : 0));
        const uint32_t stage = base + s * (BYTES_A + BYTES_B);
        load_box(stage, &map_a, shared_address(&full[s]), step * BK, m0);
        load_box(stage + BYTES_A, &map_b, shared_address(&full[s]), step * BK, n0);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  float sum[32];
  for (int i = 0; i < 32; i++) sum[i] = 0;
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    const int s = step % STAGES, phase = step / STAGES & 1;
    barrier_wait(shared_address(&full[s]), phase);
    const uint32_t a = base + s * (BYTES_A + BYTES_B) + (group - 1) * 64 * BK * 2, b = base + s * (BYTES_A + BYTES_B) + BYTES_A;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int q = 0; q < BK; q += 16) multiply(sum, descriptor(a + q * 2), descriptor(b + q * 2));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (flags & 2) barrier_arrive(shared_address(&empty[s]));
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (!(flags & 2)) barrier_arrive(shared_address(&empty[s]));
  }
  const int lane = t & 31, row = m0 + (group - 1) * 64 + (t >> 5 & 3) * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const int column = n0 + i * 8 + lane % 4 * 2;
    if (column >= n) continue;
    if (row < m) d[row * n + column] = sum[i * 4], d[row * n + column + 1] = sum[i * 4 + 1];
    if (row + 8 < m) d[(row + 8) * n + column] = sum[i * 4 + 2], d[(row + 8) * n + column + 1] = sum[i * 4 + 3];
  }
}

// 64 x 8 x 16 without swizzle, its operands written by the threads: they have to be fenced towards the async proxy.
extern "C" __global__ void wgmma_small(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out) {
  __shared__ __align__(128) __nv_bfloat16 sa[64 * 16], sb[8 * 16];
  const int t = threadIdx.x;
  // 8 x 8 core matrices of 128 bytes: 128 bytes apart along k, 256 along m or n.
  for (int i = t; i < 64 * 16; i += 128) sa[i / 128 * 128 + i % 16 / 8 * 64 + i / 16 % 8 * 8 + i % 8] = a[i];
  sb[t % 16 / 8 * 64 + t / 16 * 8 + t % 8] = b[t];
  fence_proxy();
  __syncthreads();
  float d[4] = {0, 0, 0, 0};
  const uint64_t layout = (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32;
  const uint64_t da = shared_address(sa) >> 4 | layout, db = shared_address(sb) >> 4 | layout;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, %4, %5, 0, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(da), "l"(db));
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  const int lane = t & 31, row = (t >> 5) * 16 + lane / 4, column = lane % 4 * 2;
  out[row * 8 + column] = d[0], out[row * 8 + column + 1] = d[1];
  out[(row + 8) * 8 + column] = d[2], out[(row + 8) * 8 + column + 1] = d[3];
}

// The same with 32 along k in two steps whose a comes from registers, which a product in flight still reads.
extern "C" __global__ void wgmma_registers(const __nv_bfloat16 *a, const __nv_bfloat16 *b, float *out) {
  __shared__ __align__(128) __nv_bfloat16 sb[2][8 * 16];
  const int t = threadIdx.x, lane = t & 31, row = (t >> 5) * 16 + lane / 4, column = lane % 4 * 2;
  for (int step = 0; step < 2; step++) sb[step][t % 16 / 8 * 64 + t / 16 * 8 + t % 8] = b[t / 16 * 32 + step * 16 + t % 16];
  fence_proxy();
  __syncthreads();
  float d[4] = {0, 0, 0, 0};
#pragma unroll 1
  for (int step = 0; step < 2; step++) {
    uint32_t x[4];
    for (int i = 0; i < 4; i++)
      x[i] = reinterpret_cast<const uint32_t *>(a)[((row + i % 2 * 8) * 32 + step * 16 + i / 2 * 8 + column) / 2];
    const uint64_t db = shared_address(sb[step]) >> 4 | (uint64_t)(128 >> 4) << 16 | (uint64_t)(256 >> 4) << 32;
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "l"(db));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  out[row * 8 + column] = d[0], out[row * 8 + column + 1] = d[1];
  out[(row + 8) * 8 + column] = d[2], out[(row + 8) * 8 + column + 1] = d[3];
}

// 64 pixels of 64 channels, shifted by (1, 2) as one tap of a 3 x 3 filter, loaded by im2col and stored again by TMA.
extern "C" __global__ void im2col(const __grid_constant__ CUtensorMap map_x, const __grid_constant__ CUtensorMap map_y,
                                  int x, int y) {
  extern __shared__ __align__(1024) uint8_t raw[];
  __shared__ __align__(8) uint64_t barrier;
  const uint32_t base = (shared_address(raw) + 1023) & ~1023u, loaded = shared_address(&barrier);
  if (threadIdx.x == 0) {
    barrier_init(loaded, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(loaded, 64 * 64 * 2);
    const uint16_t dx = 1, dy = 2;
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
        "[%2], {%7, %8};" ::"r"(base),
        "l"(&map_x), "r"(loaded), "r"(0), "r"(x - 1), "r"(y - 1), "r"(0), "h"(dx), "h"(dy)
        : "memory");
  }
  __syncthreads();
  barrier_wait(loaded, 0);
  if (threadIdx.x == 0) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map_y),
                 "r"(base), "r"(0), "r"(0)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}

// Threads bring a tile by cp.async and are told of it by an mbarrier; a plain bulk copy takes it out again, doubled.
extern "C" __global__ void copy_signal(const float *x, float *y) {
  __shared__ __align__(16) float s[512];
  __shared__ __align__(8) uint64_t barrier;
  const int t = threadIdx.x;
  const uint32_t arrived = shared_address(&barrier);
  if (t == 0) barrier_init(arrived, 128);
  __syncthreads();
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&s[t * 4])), "l"(x + t * 4));
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(arrived) : "memory");
  barrier_wait(arrived, 0);
  float v[4];
  for (int i = 0; i < 4; i++) v[i] = s[(t * 4 + i + 128) % 512] * 2;
  __syncthreads();
  for (int i = 0; i < 4; i++) s[t * 4 + i] = v[i];
  fence_proxy();
  __syncthreads();
  if (t == 0) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], 2048;" ::"l"(y), "r"(shared_address(s)) : "memory");
    asm volatile("cp.async.bulk.commit_group;");
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}
