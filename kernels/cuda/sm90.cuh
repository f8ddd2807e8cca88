// Building blocks of the kernels for Hopper alone (families that end in _sm90): programmatic dependent launch,
// mbarriers, TMA copies between tensors and shared memory, clusters, wgmma and its descriptors, setmaxnreg.
// Shared memory is named by its 32-bit address (shared_address of tile.cuh). A loaded tile is rows of one swizzle span
// (128, 64 or 32 bytes), 64, 32 or 16 elements: an operand "along k" (K-major) has a row of 64 k per m or n, one
// "across k" (MN-major) a row of m or n per k, in as many chunks of rows as its width has spans. Operand chunks start
// on multiples of 1024 bytes.
#pragma once
#include "tile.cuh"

// A CUtensorMap, passed by value as `const __grid_constant__ TensorMap`.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// ---- programmatic dependent launch: a kernel's blocks may begin while the kernel before it in the stream still runs
// (engine/cuda/kernel_table.ts asks for it), so that their start and what they set up cost no time of their own. Every entry of
// these files calls launch_dependents() first, which lets the next kernel's blocks in where there is room, and has every
// thread call wait_for_prerequisites() before it reads or writes global memory or ends. The wait is for the kernel before
// alone: it has ended, so its own wait was over, and so on back. One kernel without a wait would break that chain for all
// behind it. What global memory holds may change while a kernel is already there: no ld.global.nc, and no __restrict__ const,
// which turns loads into such and lets the compiler move them before the wait. The virtual GPU reports all of this.

DEVICE void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
DEVICE void wait_for_prerequisites() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

// ---- mbarriers: 8 bytes of shared memory each. A wait on `parity` passes once the phase of that parity has ended; the
// first phase has parity 0, so on a fresh barrier a wait on 1 passes at once.

DEVICE void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before the block's barrier: makes them known to TMA.
DEVICE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives, and has the phase also wait for `bytes` of TMA loads (whole boxes, what lies outside the tensor counted too).
DEVICE void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A ring of stages: where it stands, and the parity of its barriers' phases there.
template <int STAGES> struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ void skip(int stages) {
    parity ^= (stage + stages) / STAGES & 1;
    stage = (stage + stages) % STAGES;
  }
};

// ---- roles of warps

// One lane of a converged warp.
DEVICE bool elect_one() {
  uint32_t leader;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(leader));
  return leader != 0;
}
// Of a whole warpgroup, first thing in its branch of the one if that parts the roles. 384 threads start with 168 each.
template <int count> DEVICE void registers_shrink_to() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)); }
template <int count> DEVICE void registers_grow_to() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)); }
// Barrier `id` (1 to 15; 0 is __syncthreads) among `threads` threads.
DEVICE void named_barrier(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- clusters: blocks that run together, in which a variable in shared memory lies at the same address. A launch without
// clusters has one block in each. TMA can bring a box to all of them at once.

// What a thread has before it arrives is seen by every thread of the cluster that has waited.
DEVICE void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
struct Cluster {
  uint32_t blocks, rank;
  __device__ Cluster() {
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  }
  // All threads of all blocks. Before it, nothing of another block may be touched; after the last, nothing any more.
  __device__ void sync() const { cluster_arrive(), cluster_wait(); }
};
// At the barrier of that place in block `rank`. It says that wgmma has read a stage; what a thread wrote would want
// .release.cluster, which fences at every step.
DEVICE void mbarrier_arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
               "r"(rank)
               : "memory");
}

// ---- TMA. Coordinates run from the innermost dimension outwards.

// What this thread wrote to shared memory is seen by TMA stores and wgmma of whoever it synchronises with afterwards.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// A map is a parameter of this launch, so this may go before the wait.
DEVICE void prefetch_map(const TensorMap &map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }

// Asks for a box to be brought to L2. Before the wait too: what has not been written yet is written there, to the same lines.
DEVICE void prefetch_box(const TensorMap &map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(&map), "r"(x), "r"(y), "r"(z) : "memory");
}

// The same for the line of 128 bytes that p lies in.
DEVICE void prefetch_line(const void *p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)) : "memory"); }

DEVICE void load_box(uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
DEVICE void load_box(uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
// Pixels from (x, y, image) on, in the order and bounds of the map, each read at (x + right, y + down).
DEVICE void load_pixels(uint32_t to, const TensorMap &map, uint32_t barrier, int channel, int x, int y, int image, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2], "
      "{%7, %8};" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(uint16_t(right)), "h"(uint16_t(down))
      : "memory");
}

// The same to those blocks of a cluster whose bits are set: to this place, and told to this barrier, in each.
DEVICE void load_box_to(uint16_t blocks, uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], "
      "[%2], %6;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(blocks)
      : "memory");
}
DEVICE void load_box_to(uint16_t blocks, uint32_t to, const TensorMap &map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6}], "
      "[%2], %7;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "h"(blocks)
      : "memory");
}
DEVICE void load_pixels_to(uint16_t blocks, uint32_t to, const TensorMap &map, uint32_t barrier, int channel, int x, int y, int image, int right, int down) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], {%7, %8}, %9;" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(channel), "r"(x), "r"(y), "r"(image), "h"(uint16_t(right)), "h"(uint16_t(down)), "h"(blocks)
      : "memory");
}

DEVICE void store_box(const TensorMap &map, uint32_t from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(&map), "r"(from), "r"(x),
               "r"(y), "r"(z)
               : "memory");
}
DEVICE void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all but the newest `pending` groups of this thread have read their shared memory, which may then be written again.
template <int pending> DEVICE void stores_wait_read() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"); }

// Byte offset of a 16-byte chunk of a row in a tile that TMA swizzles; the tile starts on a multiple of 1024 bytes.
template <int span> DEVICE uint32_t swizzled(int row, int chunk) {
  static_assert(span == 128 || span == 64 || span == 32, "bytes of a row");
  const uint32_t at = uint32_t(row * span + chunk * 16);
  return at ^ (at >> 3 & (span - 16));
}

// Fragments to shared memory, the counterpart of load_matrices: lane i gives the address of row i % 8 of matrix i / 8.
DEVICE void store_matrices(uint32_t address, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}

// ---- wgmma. A product of a warpgroup is d[64, N] (+)= a[64, 16] b[16, N]; thread t of it holds d at rows
// 16 (t / 32) + t % 32 / 4 + 8 (i / 2 % 2) and columns 8 (i / 4) + 2 (t % 4) + i % 2, for i in 0 .. N / 2.
// Order: fence (accumulators were written), products, commit, wait; accumulators may not be touched in between.

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

DEVICE uint64_t descriptor(uint32_t address, uint32_t leading, uint32_t stride, uint32_t swizzle) {
  return uint64_t(address >> 4 & 0x3FFF) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(swizzle) << 62;
}
// Along k, rows of 128 bytes. The next 16 k are 32 bytes on.
DEVICE uint64_t descriptor_along(uint32_t tile) { return descriptor(tile, 16, 1024, 1); }
// Across k, in chunks of `span` bytes of m or n, `chunk_bytes` apart. The next 16 k are 16 * span bytes on.
template <int span> DEVICE uint64_t descriptor_across(uint32_t tile, uint32_t chunk_bytes) {
  return descriptor(tile, chunk_bytes, 8 * span, span == 128 ? 1 : span == 64 ? 2 : 3);
}
// A descriptor `bytes` further on.
DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) { return descriptor + (bytes >> 4); }

#if defined(T_FLOAT16)
#define WGMMA_TYPES "f32.f16.f16"
#else // float32 too: product_sm90.cuh
#define WGMMA_TYPES "f32.bf16.bf16"
#endif

#define WGMMA_R0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_R1 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_R2 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_R3 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_R4 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_R5 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_R6 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_R7 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_R8 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_R9 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_R10 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_R11 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_R12 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_R13 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_R14 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_R15 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA_4 WGMMA_R0 WGMMA_R1 WGMMA_R2 WGMMA_R3
#define WGMMA_5 WGMMA_4 WGMMA_R4
#define WGMMA_8 WGMMA_5 WGMMA_R5 WGMMA_R6 WGMMA_R7
#define WGMMA_10 WGMMA_8 WGMMA_R8 WGMMA_R9
#define WGMMA_16 WGMMA_10 WGMMA_R10 WGMMA_R11 WGMMA_R12 WGMMA_R13 WGMMA_R14 WGMMA_R15
#define WGMMA_D1(g) \
  "+f"(d[8 * g]), "+f"(d[8 * g + 1]), "+f"(d[8 * g + 2]), "+f"(d[8 * g + 3]), "+f"(d[8 * g + 4]), "+f"(d[8 * g + 5]), \
      "+f"(d[8 * g + 6]), "+f"(d[8 * g + 7])
#define WGMMA_D4 WGMMA_D1(0), WGMMA_D1(1), WGMMA_D1(2), WGMMA_D1(3)
#define WGMMA_D5 WGMMA_D4, WGMMA_D1(4)
#define WGMMA_D8 WGMMA_D5, WGMMA_D1(5), WGMMA_D1(6), WGMMA_D1(7)
#define WGMMA_D10 WGMMA_D8, WGMMA_D1(8), WGMMA_D1(9)
#define WGMMA_D16 WGMMA_D10, WGMMA_D1(10), WGMMA_D1(11), WGMMA_D1(12), WGMMA_D1(13), WGMMA_D1(14), WGMMA_D1(15)

// d (+)= a b; without `accumulate` d is overwritten. A_ACROSS, B_ACROSS: which operand lies across k.
template <int N, bool A_ACROSS, bool B_ACROSS> struct Wgmma;
// Of bytes of e4m3, both along k: 32 of them are as long as 16 halves.
template <int N> struct WgmmaFp8;
// a in registers, as the A fragments of mma.sync: a warp's own 16 rows.
template <int N, bool B_ACROSS> struct WgmmaFromRegisters;

#define WGMMA(N, groups, p0, p1, p2, p3, p4, p5, p6) \
  template <bool A_ACROSS, bool B_ACROSS> struct Wgmma<N, A_ACROSS, B_ACROSS> { \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES \
                   " {" WGMMA_##groups "}, %" p0 ", %" p1 ", p, 1, 1, %" p3 ", %" p4 ";\n}" \
                   : WGMMA_D##groups \
                   : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(A_ACROSS)), "n"(int(B_ACROSS))); \
    } \
  }; \
  template <> struct WgmmaFp8<N> { \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3" \
                   " {" WGMMA_##groups "}, %" p0 ", %" p1 ", p, 1, 1;\n}" \
                   : WGMMA_D##groups \
                   : "l"(a), "l"(b), "r"(int(accumulate))); \
    } \
  }; \
  template <bool B_ACROSS> struct WgmmaFromRegisters<N, B_ACROSS> { \
    static __device__ __forceinline__ void multiply(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) { \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" p5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16." WGMMA_TYPES \
                   " {" WGMMA_##groups "}, {%" p0 ", %" p1 ", %" p2 ", %" p3 "}, %" p4 ", p, 1, 1, %" p6 ";\n}" \
                   : WGMMA_D##groups \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(B_ACROSS))); \
    } \
  };
WGMMA(64, 4, "32", "33", "34", "35", "36", "37", "38")
WGMMA(80, 5, "40", "41", "42", "43", "44", "45", "46")
WGMMA(128, 8, "64", "65", "66", "67", "68", "69", "70")
WGMMA(160, 10, "80", "81", "82", "83", "84", "85", "86")
WGMMA(256, 16, "128", "129", "130", "131", "132", "133", "134")

template <bool A_ACROSS, bool B_ACROSS, int COUNT> DEVICE void wgmma(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
  Wgmma<2 * COUNT, A_ACROSS, B_ACROSS>::multiply(d, a, b, accumulate);
}
template <int COUNT> DEVICE void wgmma_fp8(float (&d)[COUNT], uint64_t a, uint64_t b, bool accumulate) {
  WgmmaFp8<2 * COUNT>::multiply(d, a, b, accumulate);
}
template <bool B_ACROSS, int COUNT> DEVICE void wgmma(float (&d)[COUNT], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  WgmmaFromRegisters<2 * COUNT, B_ACROSS>::multiply(d, a, b, accumulate);
}

// An entry of one producer warpgroup and two consumers; one block fills a multiprocessor.
constexpr int WARPGROUP = 128;
#define KERNEL_SM90(name) extern "C" __global__ void __launch_bounds__(3 * WARPGROUP, 1) JOIN(name, DTYPE)
