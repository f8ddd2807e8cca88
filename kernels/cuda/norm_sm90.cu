// Group norm (+SiLU) over [n, hw, c] in one launch and one reading, for Hopper. A cluster takes a slab of an image: whole groups
// of channels, a share of the rows to each of its blocks, which keeps them in shared memory between the sums and the result.
// What the other blocks have summed is read from their shared memory.
// A block sums a group about one of its own values, which bounds what cancels however far the mean lies from zero; the blocks'
// moments are then merged in order (Chan, Golub & LeVeque 1983). How a tensor is cut is up to engine/cuda/plan_norm_sm90.ts.
#include "norm.cuh"
#include "sm90.cuh"

extern __shared__ __align__(16) uint8_t shared[];

// The float at `address` of another block's shared memory.
DEVICE float load_remote(uint32_t address, int rank) {
  uint32_t x;
  asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %1, %2;\nld.shared::cluster.u32 %0, [at];\n}" : "=r"(x) : "r"(address), "r"(rank) : "memory");
  return __uint_as_float(x);
}

// A warp to each group of the slab.
#define EACH_GROUP(g) _Pragma("unroll 1") for (int g = threadIdx.x / 32; g < slab_groups; g += int(blockDim.x) / 32)

// The first `own` channels lie in x, the others in skip, whole packs in each.
// blockIdx.x is the slab times `blocks`, plus the rank in the cluster; blockIdx.y is the image. A block has `share` rows, the last
// ones fewer or none. A slab is whole packs wide, at most one for each thread.
KERNEL(group_norm_cluster)(T *y, float *mean, float *rstd, const T *x, const T *skip, const T *weight, const T *bias, int hw, int c,
                           int own, int groups, int slab_groups, int blocks, int share, int with_silu, float eps) {
  const int width = c / groups, slab = slab_groups * width, first_group = int(blockIdx.x) / blocks * slab_groups;
  const int rank = int(blockIdx.x) % blocks, start = rank * share, count = max(0, min(share, hw - start));
  const int packs = slab / PACK, lanes = int(blockDim.x) / packs, lane = threadIdx.x / packs, k = int(threadIdx.x) % packs * PACK;
  const int own_lane = threadIdx.x % 32, channel = first_group * width;
  const int64_t first = int64_t(blockIdx.y) * hw + start;
  const Image image = {x, skip, own, c};
  // Of each group, what the others read and the outcome; each thread's sums; the rows.
  float *moments = reinterpret_cast<float *>(shared), *outcome = moments + 2 * slab_groups;
  float *sums = outcome + 2 * slab_groups, *squares = sums + blockDim.x * PACK;
  T *rows = reinterpret_cast<T *>(squares + blockDim.x * PACK);

  launch_dependents();
  wait_for_prerequisites();
  if (lane < lanes) {
    const T *from = image.at(first, channel + k);
    const int stride = image.stride(channel + k);
    Pack shift = {}, sum = {}, square = {};
    if (count > 0)
#pragma unroll
      for (int j = 0; j < PACK; j++) shift.at[j] = to_float(*image.at(first, channel + (k + j) / width * width));
#pragma unroll 32
    for (int r = lane; r < count; r += lanes) {
      const Stored<T> in = *reinterpret_cast<const Stored<T> *>(from + int64_t(r) * stride);
      *reinterpret_cast<Stored<T> *>(rows + r * slab + k) = in;
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float d = to_float(in.at[j]) - shift.at[j];
        sum.at[j] += d;
        square.at[j] += d * d;
      }
    }
    store(sums + lane * slab + k, sum, PACK, true);
    store(squares + lane * slab + k, square, PACK, true);
  }
  __syncthreads();
  EACH_GROUP(g) {
    float total = 0, spread = 0;
#pragma unroll 1
    for (int i = own_lane; i < lanes * width; i += 32) {
      const int at = i / width * slab + g * width + i % width;
      total += sums[at];
      spread += squares[at];
    }
    total = warp_sum(total), spread = warp_sum(spread);
    if (own_lane == 0 && count > 0) {
      const float off = total / (float(count) * float(width)); // the mean's distance from what was subtracted
      moments[2 * g] = to_float(rows[g * width]) + off;
      moments[2 * g + 1] = spread - total * off;
    }
  }
  cluster_arrive();
  cluster_wait();
  EACH_GROUP(g) {
    const int theirs = own_lane < blocks ? max(0, min(share, hw - own_lane * share)) : 0;
    const float weighed = float(theirs) * float(width), all = float(hw) * float(width);
    float centre = 0, spread = 0;
    if (theirs > 0) {
      const uint32_t at = shared_address(moments + 2 * g);
      centre = load_remote(at, own_lane), spread = load_remote(at + 4, own_lane);
    }
    const float base = __shfl_sync(0xffffffffu, centre, 0), off = warp_sum(weighed * (centre - base)) / all;
    const float d = centre - base - off, scale = 1.f / sqrtf(warp_sum(spread + weighed * d * d) / all + eps);
    if (own_lane == 0) {
      outcome[2 * g] = base + off, outcome[2 * g + 1] = scale;
      if (rank == 0) {
        const int at = blockIdx.y * groups + first_group + g;
        mean[at] = base + off, rstd[at] = scale;
      }
    }
  }
  cluster_arrive(); // the others' memory is not read after this
  __syncthreads();
  if (lane < lanes) {
    const Pack w = load(weight + channel + k, PACK, true), b = load(bias + channel + k, PACK, true);
    Pack factor, shift;
#pragma unroll
    for (int j = 0; j < PACK; j++) {
      const int g = (k + j) / width;
      factor.at[j] = outcome[2 * g + 1] * w.at[j];
      shift.at[j] = b.at[j] - outcome[2 * g] * factor.at[j];
    }
#pragma unroll 4
    for (int r = lane; r < count; r += lanes) {
      Pack value = load(rows + r * slab + k, PACK, true);
#pragma unroll
      for (int j = 0; j < PACK; j++) {
        const float z = value.at[j] * factor.at[j] + shift.at[j];
        value.at[j] = with_silu ? __fdividef(z, 1.f + exp2_of(-1.44269504f * z)) : z;
      }
      store(y + (first + r) * c + channel + k, value, PACK, true);
    }
  }
  cluster_wait();
}
