// How the matrix product of kernels/cuda/product_sm90.cuh came about: y[m, n] = x[m, k] w[n, k]^T in bfloat16 with float32
// sums, slow to fast. Each entry is what one idea adds to the one before it; README.md tables what each should reach. The
// program uses none of them. n and k are multiples of 8.
#include "../cuda/sm90.cuh"

struct Size {
  int m, n, k;
};

DEVICE void put_pair(T *y, const Size &s, int row, int column, float low, float high) {
  if (row < s.m && column < s.n) *reinterpret_cast<uint32_t *>(y + int64_t(row) * s.n + column) = round_pair(low, high);
}

// Step 1: a thread per element, everything from global memory.
extern "C" __global__ void __launch_bounds__(256) gemm_1_naive(T *y, const T *x, const T *w, int m, int n, int k) {
  const int row = blockIdx.y, column = blockIdx.x * 256 + threadIdx.x;
  if (column >= n) return;
  float sum = 0;
  for (int i = 0; i < k; i++) sum += to_float(x[int64_t(row) * k + i]) * to_float(w[int64_t(column) * k + i]);
  y[int64_t(row) * n + column] = from_float<T>(sum);
}

// Rows `first` on of a matrix [rows][k], columns k0 .. k0 + 8 CHUNKS, into a tile of COUNT rows; zeros outside.
template <int COUNT, int CHUNKS, int THREADS_, class Place> DEVICE void fill(uint32_t tile, const T *from, int rows, int k, int first, int k0, Place place) {
#pragma unroll
  for (int i = threadIdx.x; i < COUNT * CHUNKS; i += THREADS_) {
    const int row = i / CHUNKS, chunk = i % CHUNKS;
    uint4 value = {0, 0, 0, 0};
    if (first + row < rows && k0 + 8 * chunk < k) value = *reinterpret_cast<const uint4 *>(from + int64_t(first + row) * k + k0 + 8 * chunk);
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(tile + place(row, chunk)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w) : "memory");
  }
}

// Step 2: a block shares tiles of 64 x 64 x 32 in shared memory, its four warps multiply 32 x 32 each with mma.sync.
extern "C" __global__ void __launch_bounds__(128) gemm_2_tiles(T *y, const T *x, const T *w, int m, int n, int k) {
  __shared__ __align__(128) T a[64 * 32], b[64 * 32];
  const uint32_t a_tile = shared_address(a), b_tile = shared_address(b);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, m0 = blockIdx.y * 64, n0 = blockIdx.x * 64;
  const int down = warp / 2 * 32, across = warp % 2 * 32;
  const auto place = [](int row, int chunk) { return tile_offset<4>(row, chunk); };
  float sums[2][4][4] = {};
  for (int k0 = 0; k0 < k; k0 += 32) {
    __syncthreads();
    fill<64, 4, 128>(a_tile, x, m, k, m0, k0, place);
    fill<64, 4, 128>(b_tile, w, n, k, n0, k0, place);
    __syncthreads();
#pragma unroll
    for (int q = 0; q < 32; q += 16) {
      uint32_t fa[2][4], fb[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) load_a<4>(fa[i], a_tile, down + 16 * i, q, lane), load_b<4>(fb[i], b_tile, across + 16 * i, q, lane);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) multiply(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
    }
  }
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int half = 0; half < 2; half++)
        put_pair(y, {m, n, k}, m0 + down + 16 * i + 8 * half + lane / 4, n0 + across + 8 * j + lane % 4 * 2, sums[i][j][2 * half], sums[i][j][2 * half + 1]);
}

// The sums of a warpgroup's 64 rows, straight from registers.
template <int N> DEVICE void put_sums(T *y, const Size &s, const float (&sums)[N / 2], int m0, int n0) {
  const int lane = threadIdx.x % 32, row = m0 + threadIdx.x % WARPGROUP / 32 * 16 + lane / 4;
#pragma unroll
  for (int j = 0; j < N / 8; j++)
#pragma unroll
    for (int half = 0; half < 2; half++)
      put_pair(y, s, row + 8 * half, n0 + 8 * j + lane % 4 * 2, sums[4 * j + 2 * half], sums[4 * j + 2 * half + 1]);
}

template <int N> DEVICE void multiply_stage(float (&sums)[N / 2], uint32_t a, uint32_t b, bool accumulate) {
  wgmma_fence();
#pragma unroll
  for (int q = 0; q < 4; q++)
    wgmma<false, false>(sums, advance(descriptor_along(a), 32 * q), advance(descriptor_along(b), 32 * q), accumulate || q > 0);
  wgmma_commit();
}

// Step 3: two warpgroups multiply a tile of 128 x 128 x 64 from shared memory with wgmma; the threads still fill it, then wait.
extern "C" __global__ void __launch_bounds__(256) gemm_3_wgmma(T *y, const T *x, const T *w, int m, int n, int k) {
  __shared__ __align__(1024) uint8_t tiles[2 * 16384];
  const uint32_t a = shared_address(tiles), b = a + 16384;
  const int group = threadIdx.x / WARPGROUP, m0 = blockIdx.y * 128, n0 = blockIdx.x * 128;
  const auto place = [](int row, int chunk) { return swizzled<128>(row, chunk); };
  float sums[64];
#pragma unroll 1
  for (int k0 = 0; k0 < k; k0 += 64) {
    fill<128, 8, 256>(a, x, m, k, m0, k0, place);
    fill<128, 8, 256>(b, w, n, k, n0, k0, place);
    fence_async_proxy();
    __syncthreads();
    multiply_stage<128>(sums, a + group * 8192, b, k0 > 0);
    wgmma_wait<0>();
    __syncthreads();
  }
  put_sums<128>(y, {m, n, k}, sums, m0 + 64 * group, n0);
}

// Step 4: a warp brings tiles of 128 x 160 x 64 by TMA into a ring of four stages, ahead of the products.
// Step 5: two blocks of a cluster, one tile below the other, share w's: either brings half of it to both.
constexpr int STAGES = 4, A_BYTES = 128 * 128, B_BYTES = 160 * 128, STAGE_BYTES = A_BYTES + B_BYTES;

template <bool PAIRED> DEVICE void ring_of_stages(T *y, const TensorMap &x, const TensorMap &w, const Size &s, int m0, int n0) {
  constexpr int BLOCKS = PAIRED ? 2 : 1;
  extern __shared__ __align__(1024) uint8_t stages[];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  const uint32_t base = (shared_address(stages) + 1023) & ~1023u, full = shared_address(barriers), empty = full + 8 * STAGES;
  const Cluster cluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 8 * BLOCKS);
    fence_mbarrier_init();
  }
  if constexpr (PAIRED) cluster.sync();
  else __syncthreads();
  Ring<STAGES> ring;
  if (threadIdx.x < WARPGROUP) {
    registers_shrink_to<40>();
    if (threadIdx.x < 32 && elect_one()) {
#pragma unroll 1
      for (int k0 = 0; k0 < s.k; k0 += 64, ring.next()) {
        const uint32_t stage = base + ring.stage * STAGE_BYTES, barrier = full + 8 * ring.stage;
        mbarrier_wait(empty + 8 * ring.stage, ring.parity ^ 1);
        mbarrier_arrive_expect(barrier, STAGE_BYTES);
        load_box(stage, x, barrier, k0, m0, 0);
        const int half = cluster.rank;
        if constexpr (PAIRED) load_box_to(3, stage + A_BYTES + half * (B_BYTES / 2), w, barrier, k0, n0 + 80 * half, 0);
        else load_box(stage + A_BYTES, w, barrier, k0, n0, 0);
      }
    }
  } else {
    registers_grow_to<232>();
    const int group = threadIdx.x / WARPGROUP - 1;
    float sums[80];
#pragma unroll 1
    for (int k0 = 0; k0 < s.k; k0 += 64, ring.next()) {
      const uint32_t stage = base + ring.stage * STAGE_BYTES;
      mbarrier_wait(full + 8 * ring.stage, ring.parity);
      multiply_stage<160>(sums, stage + group * 8192, stage + A_BYTES, k0 > 0);
      wgmma_wait<0>();
      if (threadIdx.x % 32 < BLOCKS) mbarrier_arrive_at(empty + 8 * ring.stage, threadIdx.x % 32);
      __syncwarp();
    }
    put_sums<160>(y, s, sums, m0 + 64 * group, n0);
  }
  if constexpr (PAIRED) cluster.sync();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_4_ring(T *y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int m, int n, int k) {
  ring_of_stages<false>(y, x, w, {m, n, k}, blockIdx.y * 128, blockIdx.x * 160);
}
extern "C" __global__ void __launch_bounds__(384, 1)
    gemm_5_pair(T *y, const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w, int m, int n, int k) {
  ring_of_stages<true>(y, x, w, {m, n, k}, blockIdx.x * 128, blockIdx.y * 160);
}
