// Clusters of blocks: each writes into the other's shared memory and reads it; TMA brings a tensor's boxes to both at once,
// tiled and by im2col, through a ring whose stages both have to free. `flags` plants faults that taking an instruction out of
// the PTX cannot: 1 waits for no other block's arrivals, 2 announces half the bytes, 4 announces too many, 8 names a block that
// is not there, 16 writes beyond the other's memory.
#include <cstdint>
#include <cuda.h>

static __device__ uint32_t shared_address(const void *p) { return __cvta_generic_to_shared(p); }
static __device__ uint32_t cluster_blocks() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
  return n;
}
static __device__ uint32_t cluster_rank() {
  uint32_t n;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(n));
  return n;
}
static __device__ uint32_t map_to(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
static __device__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
static __device__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// y[block][2 i] = what the next block wrote here, y[block][2 i + 1] = what this block wrote there.
extern "C" __global__ void exchange(const int *x, int *y, int flags) {
  __shared__ int s[64];
  const int t = threadIdx.x;
  const uint32_t next = (cluster_rank() + 1) % cluster_blocks();
  const uint32_t there = map_to(shared_address(&s[t]), flags & 8 ? cluster_blocks() : next) + (flags & 16 ? 4096 : 0);
  cluster_sync();
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(there), "r"(x[blockIdx.x * 64 + t]) : "memory");
  cluster_sync();
  int back;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(back) : "r"(map_to(shared_address(&s[63 - t]), next)) : "memory");
  y[blockIdx.x * 128 + 2 * t] = s[t];
  y[blockIdx.x * 128 + 2 * t + 1] = back;
  cluster_sync();
}

constexpr int STAGES = 2, BOX = 1024, PARTS = 2;

// Steps of two boxes of 1024 bytes, which the blocks of a cluster bring in turns and to all of them; each writes all it gets.
template <class Load> static __device__ void bring(uint32_t *y, int steps, int flags, Load load) {
  __shared__ __align__(1024) uint32_t tile[STAGES][PARTS * BOX / 4];
  __shared__ __align__(8) uint64_t barriers[2 * STAGES];
  const uint32_t full = shared_address(barriers), empty = full + 8 * STAGES;
  const uint32_t blocks = cluster_blocks(), rank = cluster_rank(), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full + 8 * i) : "memory");
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(empty + 8 * i), "r"(flags & 1 ? 1 : blocks) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const int stage = step % STAGES, phase = step / STAGES & 1;
      const uint32_t barrier = full + 8 * stage, bytes = flags & 2 ? BOX : PARTS * BOX + (flags & 4 ? 16 : 0);
      barrier_wait(empty + 8 * stage, phase ^ 1);
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#pragma unroll 1
      for (uint32_t part = rank; part < PARTS; part += blocks)
        load(shared_address(tile[stage]) + part * BOX, barrier, PARTS * step + part, uint16_t((1 << blocks) - (flags & 8 ? 0 : 1)));
    }
  } else if (threadIdx.x >= 32) {
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
      const int stage = step % STAGES, phase = step / STAGES & 1;
      barrier_wait(full + 8 * stage, phase);
#pragma unroll 1
      for (int i = lane; i < PARTS * BOX / 4; i += 32) y[(blockIdx.x * steps + step) * (PARTS * BOX / 4) + i] = tile[stage][i];
      __syncwarp();
      if (flags & 1 ? lane == rank : lane < blocks)
        asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(map_to(empty + 8 * stage, lane)) : "memory");
    }
  }
  cluster_sync();
}

// Boxes of 8 rows of 64 halves.
extern "C" __global__ void multicast(const __grid_constant__ CUtensorMap map, uint32_t *y, int steps, int flags) {
  bring(y, steps, flags, [&](uint32_t to, uint32_t barrier, int part, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, "
        "%5}], [%2], %6;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(0), "r"(8 * part), "r"(0), "h"(mask)
        : "memory");
  });
}

// The eight pixels of 64 channels of image `part`, at the tap (1, 0).
extern "C" __global__ void multicast_pixels(const __grid_constant__ CUtensorMap map, uint32_t *y, int steps, int flags) {
  bring(y, steps, flags, [&](uint32_t to, uint32_t barrier, int part, uint16_t mask) {
    const uint16_t right = 1, down = 0;
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, "
        "%5, %6}], [%2], {%7, %8}, %9;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(0), "r"(0), "r"(0), "r"(part), "h"(right), "h"(down), "h"(mask)
        : "memory");
  });
}

// The same pixels as a box of the image.
extern "C" __global__ void multicast_boxes(const __grid_constant__ CUtensorMap map, uint32_t *y, int steps, int flags) {
  bring(y, steps, flags, [&](uint32_t to, uint32_t barrier, int part, uint16_t mask) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, "
        "%5, %6}], [%2], %7;" ::"r"(to),
        "l"(&map), "r"(barrier), "r"(0), "r"(1), "r"(0), "r"(part), "h"(mask)
        : "memory");
  });
}
