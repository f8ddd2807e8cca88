// Group norm (+SiLU) over [n, hw, c] for Hopper, forward and backward in one launch each. A cluster takes a slab of an image: whole
// groups of channels, a share of the rows to each of its blocks, which asks for all of them at once (cp.async, so that no register
// waits) and keeps them in shared memory between the sums and the result. What finds no room there is read again, from L2 mostly.
// A block sums a group about one of its own values, which bounds what cancels however far the mean lies from zero; the blocks hand
// each other their moments, which are merged in order (Chan, Golub & LeVeque 1983). How a tensor is cut is up to
// engine/cuda/plan_norm_sm90.ts, by a model fitted to what an H200 took.
#include "norm.cuh"
#include "sm90.cuh"

extern __shared__ __align__(16) uint8_t shared[];

constexpr int WIDE = CHUNK; // halves that a thread takes at once
constexpr int SLAB_THREADS = 512;
constexpr int BATCHES = 4; // the copies of kept rows are waited for one part after another
#define SLAB_KERNEL(blocks, name) extern "C" __global__ void __launch_bounds__(SLAB_THREADS, blocks) JOIN(name, DTYPE)

// Two floats to `address` in the shared memory of the cluster's block `rank`.
DEVICE void put_remote(uint32_t address, int rank, float2 x) {
  asm volatile("{\n.reg .b32 at;\nmapa.shared::cluster.u32 at, %0, %1;\nst.shared::cluster.v2.f32 [at], {%2, %3};\n}" ::"r"(address), "r"(rank), "f"(x.x),
               "f"(x.y)
               : "memory");
}

// sigmoid(a) and sigmoid(b) with one reciprocal, as a multiprocessor makes but 16 of these or of exponentials in a cycle.
// Below -41 it is 2^-60, which times any such z is nothing beside other values.
DEVICE void sigmoids(float a, float b, float &sa, float &sb) {
  const float p = 1.f + exp2_of(fminf(-1.44269504f * a, 60.f)), q = 1.f + exp2_of(fminf(-1.44269504f * b, 60.f));
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(p * q));
  sa = q * inverse;
  sb = p * inverse;
}

// What a block has of a tensor, and a thread of that: blockIdx.x is the block's number in its cluster, blockIdx.y the slab, blockIdx.z
// the image. A block has `share` rows, the last ones fewer or none. A slab is `groups` groups of `width` channels, whole packs
// together, and a pack lies in at most two groups: a thread keeps one pack and walks every `lanes`-th row (lanes are SLAB_THREADS /
// packs, told so that no copy waits for the division). Threads that are left over have no rows.
struct Slab {
  int width, groups, lanes, channels, channel, packs, lane, k, group, split, start, count;
  __device__ Slab(int hw, int width, int groups, int lanes, int share)
      : width(width), groups(groups), lanes(lanes), channels(groups * width), channel(blockIdx.y * channels), packs(channels / WIDE),
        lane(int(threadIdx.x) / packs), k((int(threadIdx.x) - lane * packs) * WIDE), group(k / width), split(min((group + 1) * width - k, WIDE)),
        start(blockIdx.x * share), count(max(0, min(share, hw - start))) {}
  __device__ int rows() const { return lane < lanes ? count : 0; }
  __device__ bool is_first(int j) const { return j < split; }
  // Of the group of the thread's first channel, among all groups of all images.
  __device__ int number(int all_groups) const { return blockIdx.z * all_groups + blockIdx.y * groups + group; }
};

// body(row) for every row of a thread from `from` (a multiple of the lanes) to `end`.
template <class F> DEVICE void each_row(const Slab &slab, int from, int end, F &&body) {
#pragma unroll 1
  for (int r = from + slab.lane; r < end; r += slab.lanes) body(r);
}

// body(row) for the kept rows as they come, whose copies stand in BATCHES groups of `part` rows.
template <class F> DEVICE void each_kept(const Slab &slab, int kept, int part, F &&body) {
#pragma unroll 1
  for (int b = 0; b < BATCHES; b++) {
    if (b == 0) copies_wait<3>();
    else if (b == 1) copies_wait<2>();
    else if (b == 2) copies_wait<1>();
    else copies_wait<0>();
    each_row(slab, b * part, min((b + 1) * part, kept), body);
  }
}

// body(row, values...) for the rows of a thread that are not kept, several on their way at once. `load(row)` reads them.
template <int N, class L, class F> DEVICE void each_other(const Slab &slab, int kept, L &&load, F &&body) {
  const int end = slab.rows();
  typedef decltype(load(0)) In;
#pragma unroll 1
  for (int r = kept + slab.lane; r < end; r += N * slab.lanes) {
    In in[N];
#pragma unroll
    for (int i = 0; i < N; i++)
      if (r + i * slab.lanes < end) in[i] = load(r + i * slab.lanes);
#pragma unroll
    for (int i = 0; i < N; i++)
      if (r + i * slab.lanes < end) body(r + i * slab.lanes, in[i]);
  }
}

// A warp to each group of the slab.
#define EACH_GROUP(g) _Pragma("unroll 1") for (int g = threadIdx.x / 32; g < slab.groups; g += SLAB_THREADS / 32)

// Two sums of a pack's channels of one group, beside those of its other group.
DEVICE float4 by_group(const Slab &slab, const float (&x)[WIDE], const float (&y)[WIDE]) {
  float4 sums = {0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < WIDE; j++) {
    sums.x += slab.is_first(j) ? x[j] : 0.f;
    sums.y += slab.is_first(j) ? y[j] : 0.f;
    sums.z += slab.is_first(j) ? 0.f : x[j];
    sums.w += slab.is_first(j) ? 0.f : y[j];
  }
  return sums;
}

// The sums of group g over what the block's threads have left in `sums`; every lane has them. Four reads are on their way at once.
DEVICE float2 sum_of_group(const Slab &slab, const float4 *sums, int g) {
  float2 total = {0, 0};
  const int begin = g * slab.width, last = (begin + slab.width - 1) / WIDE;
#pragma unroll 1
  for (int p = begin / WIDE; p <= last; p++) {
    const bool begins_here = p * WIDE >= begin;
#pragma unroll 1
    for (int lane = threadIdx.x % 32; lane < slab.lanes; lane += 4 * 32) {
      float4 x[4];
#pragma unroll
      for (int i = 0; i < 4; i++) x[i] = lane + 32 * i < slab.lanes ? sums[(lane + 32 * i) * slab.packs + p] : float4{0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 4; i++) {
        total.x += begins_here ? x[i].x : x[i].z;
        total.y += begins_here ? x[i].y : x[i].w;
      }
    }
  }
  total.x = warp_sum(total.x), total.y = warp_sum(total.y);
  return total;
}

// Group g's moments in this block, to every block of the cluster: given[rank, g].
DEVICE void give(const Slab &slab, float2 *given, int g, float2 moments) {
  const int lane = threadIdx.x % 32;
  if (lane < gridDim.x) put_remote(shared_address(given + blockIdx.x * slab.groups + g), lane, moments);
}
DEVICE float2 given_by(const Slab &slab, const float2 *given, int g) {
  const int lane = threadIdx.x % 32;
  return lane < gridDim.x ? given[lane * slab.groups + g] : float2{0, 0};
}

// Before the first copy, and with nothing to be seen: all it says is that the block has begun.
DEVICE void cluster_begin() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }

// The first `own` channels lie in x, the others in skip, whole packs in each. Of a block's rows the first `kept` stay.
SLAB_KERNEL(2, group_norm_cluster)(T *y, float *mean, float *rstd, const T *x, const T *skip, const T *weight, const T *bias, int hw, int c, int own,
                                   int groups, int width, int slab_groups, int lanes, int share, int kept, int part, int with_silu, float eps) {
  launch_dependents();
  cluster_begin();
  const Slab slab(hw, width, slab_groups, lanes, share);
  const int64_t first = int64_t(blockIdx.z) * hw + slab.start;
  const int k = slab.channel + slab.k, room = min(kept, slab.rows());
  const Image image = {x, skip, own, c};
  const T *from = image.at(first, k);
  const int stride = image.stride(k);
  float4 *sums = reinterpret_cast<float4 *>(shared);
  float2 *given = reinterpret_cast<float2 *>(sums + SLAB_THREADS), *outcome = given + gridDim.x * slab.groups;
  T *rows = reinterpret_cast<T *>(reinterpret_cast<float4 *>(sums + SLAB_THREADS) + (gridDim.x + 1) * slab.groups);

  wait_for_prerequisites();
  const uint32_t place = shared_address(rows + slab.k);
#pragma unroll 1
  for (int b = 0; b < BATCHES; b++) {
    each_row(slab, b * part, min((b + 1) * part, room), [&](int r) { copy_async(place + r * slab.channels * 2, from + int64_t(r) * stride, true); });
    copies_commit();
  }
  float shift[WIDE];
  if (slab.count > 0) {
    const float a = to_float(*image.at(first, slab.channel + slab.group * slab.width));
    const float b = slab.split < WIDE ? to_float(*image.at(first, slab.channel + (slab.group + 1) * slab.width)) : a;
#pragma unroll
    for (int j = 0; j < WIDE; j++) shift[j] = slab.is_first(j) ? a : b;
  }
  {
    float sum[WIDE] = {}, square[WIDE] = {};
    const auto add = [&](const Chunk &in) {
#pragma unroll
      for (int j = 0; j < WIDE; j++) {
        const float d = in.at(j) - shift[j];
        sum[j] += d;
        square[j] += d * d;
      }
    };
    each_kept(slab, room, part, [&](int r) { add(chunk_at(rows + r * slab.channels + slab.k)); });
    each_other<4>(slab, kept, [&](int r) { return chunk_at(from + int64_t(r) * stride); }, [&](int, const Chunk &in) { add(in); });
    sums[threadIdx.x] = by_group(slab, sum, square);
  }
  const Chunk w = chunk_at(weight + k), b = chunk_at(bias + k);
  const float inverse = 1.f / (float(hw) * float(slab.width));
  __syncthreads();
  cluster_wait(); // all have begun
  EACH_GROUP(g) {
    const float2 total = sum_of_group(slab, sums, g);
    float2 moments = {0, 0};
    if (slab.count > 0) {
      const float off = total.x / (float(slab.count) * float(slab.width)); // the mean's distance from what was subtracted
      moments = {to_float(rows[g * slab.width]) + off, total.y - total.x * off};
    }
    give(slab, given, g, moments);
  }
  cluster_arrive();
  cluster_wait();
  EACH_GROUP(g) {
    const float weighed = float(max(0, min(share, hw - int(threadIdx.x % 32) * share))) * float(slab.width);
    const float2 theirs = given_by(slab, given, g);
    const float base = __shfl_sync(0xffffffffu, theirs.x, 0), off = warp_sum(weighed * (theirs.x - base)) * inverse;
    const float d = theirs.x - base - off, scale = 1.f / sqrtf(warp_sum(theirs.y + weighed * d * d) * inverse + eps);
    if (threadIdx.x % 32 == 0) {
      outcome[g] = {base + off, scale};
      if (blockIdx.x == 0) {
        const int at = blockIdx.z * groups + blockIdx.y * slab.groups + g;
        mean[at] = base + off, rstd[at] = scale;
      }
    }
  }
  __syncthreads();
  const float2 own_group = outcome[slab.group], next_group = outcome[min(slab.group + 1, slab.groups - 1)];
  float factor[WIDE];
#pragma unroll
  for (int j = 0; j < WIDE; j++) {
    const float2 moments = slab.is_first(j) ? own_group : next_group;
    factor[j] = moments.y * w.at(j);
    shift[j] = b.at(j) - moments.x * factor[j];
  }
  T *to = y + first * c + k;
  const auto write = [&](int r, const Chunk &in) {
    float z[WIDE];
#pragma unroll
    for (int j = 0; j < WIDE; j++) z[j] = in.at(j) * factor[j] + shift[j];
    if (with_silu) {
#pragma unroll
      for (int j = 0; j < WIDE; j += 2) {
        float a, b;
        sigmoids(z[j], z[j + 1], a, b);
        z[j] *= a, z[j + 1] *= b;
      }
    }
    put_chunk(to + int64_t(r) * c, z);
  };
  each_other<2>(slab, kept, [&](int r) { return chunk_at(from + int64_t(r) * stride); }, write);
  each_row(slab, 0, room, [&](int r) { write(r, chunk_at(rows + r * slab.channels + slab.k)); });
}

// What a thread needs to know of its channels for their gradients, and the gradients before SiLU.
struct Slopes {
  float mean[WIDE], factor[WIDE], bias[WIDE]; // z = (x - mean) factor + bias
  // d = x - mean, and dz.
  __device__ void of(const Chunk &x, const Chunk &dy, int with_silu, float (&d)[WIDE], float (&dz)[WIDE]) const {
#pragma unroll
    for (int j = 0; j < WIDE; j++) d[j] = x.at(j) - mean[j], dz[j] = dy.at(j);
    if (!with_silu) return;
#pragma unroll
    for (int j = 0; j < WIDE; j += 2) {
      const float z0 = d[j] * factor[j] + bias[j], z1 = d[j + 1] * factor[j + 1] + bias[j + 1];
      float s0, s1;
      sigmoids(z0, z1, s0, s1);
      dz[j] *= s0 * (1.f + z0 * (1.f - s0));
      dz[j + 1] *= s1 * (1.f + z1 * (1.f - s1));
    }
  }
};

// to[k] = the sum over the block's threads of x for each channel k of the slab, by two steps: what a thread writes in between lies
// where it alone has read. `scratch` holds a pack of each thread.
DEVICE void sum_channels(const Slab &slab, float *to, float *scratch, const float (&x)[WIDE]) {
  __syncthreads();
  if (slab.lane < slab.lanes)
#pragma unroll
    for (int j = 0; j < WIDE; j++) scratch[slab.lane * slab.channels + slab.k + j] = x[j];
  __syncthreads();
  const int parts = SLAB_THREADS / slab.channels, part = int(threadIdx.x) / slab.channels, k = int(threadIdx.x) % slab.channels;
  float total = 0;
  if (part < parts)
#pragma unroll 4
    for (int lane = part; lane < slab.lanes; lane += parts) total += scratch[lane * slab.channels + k];
  if (part < parts) scratch[part * slab.channels + k] = total;
  __syncthreads();
  if (int(threadIdx.x) < slab.channels) {
    total = 0;
#pragma unroll 4
    for (int i = 0; i < parts; i++) total += scratch[i * slab.channels + k];
    to[k] = total;
  }
}

struct Two {
  Chunk x, dy;
};

// dx = rstd (dz w - mean(dz w) - h mean(dz w h)) with the means over the group and h = (x - mean) rstd; and if it is wanted,
// partial[image, block of the cluster, 2, c] = the sums of dz and dz h. A slab is at most SLAB_THREADS channels wide.
SLAB_KERNEL(1, group_norm_backward_cluster)(T *dx, float *partial, const T *dy, const T *x, const T *weight, const T *bias, const float *mean,
                                            const float *rstd, int hw, int c, int groups, int width, int slab_groups, int lanes, int share, int kept, int part,
                                            int with_silu) {
  launch_dependents();
  cluster_begin();
  const Slab slab(hw, width, slab_groups, lanes, share);
  const int k = slab.channel + slab.k, room = min(kept, slab.rows());
  const int64_t first = (int64_t(blockIdx.z) * hw + slab.start) * c + k;
  float4 *sums = reinterpret_cast<float4 *>(shared);
  float *scratch = reinterpret_cast<float *>(shared); // when the sums are read
  float2 *given = reinterpret_cast<float2 *>(scratch + SLAB_THREADS * WIDE), *outcome = given + gridDim.x * slab.groups;
  T *rows = reinterpret_cast<T *>(reinterpret_cast<float4 *>(given) + (gridDim.x + 1) * slab.groups), *grads = rows + kept * slab.channels;

  wait_for_prerequisites();
  const uint32_t place = shared_address(rows + slab.k), grad_place = shared_address(grads + slab.k);
#pragma unroll 1
  for (int b = 0; b < BATCHES; b++) {
    each_row(slab, b * part, min((b + 1) * part, room), [&](int r) {
      copy_async(place + r * slab.channels * 2, x + first + int64_t(r) * c, true);
      copy_async(grad_place + r * slab.channels * 2, dy + first + int64_t(r) * c, true);
    });
    copies_commit();
  }
  Slopes slopes;
  const int own = slab.number(groups), next = slab.split < WIDE ? own + 1 : own;
  const float scale = rstd[own], next_scale = rstd[next];
  {
    const Chunk w = chunk_at(weight + k), b = chunk_at(bias + k);
    const float centre = mean[own], next_centre = mean[next];
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      slopes.mean[j] = slab.is_first(j) ? centre : next_centre;
      slopes.factor[j] = (slab.is_first(j) ? scale : next_scale) * w.at(j);
      slopes.bias[j] = b.at(j);
    }
  }
  const auto kept_row = [&](int r) { return Two{chunk_at(rows + r * slab.channels + slab.k), chunk_at(grads + r * slab.channels + slab.k)}; };
  const auto other_row = [&](int r) { return Two{chunk_at(x + first + int64_t(r) * c), chunk_at(dy + first + int64_t(r) * c)}; };
  float sum[WIDE] = {}, product[WIDE] = {};
  {
    const auto add = [&](const Two &in) {
      float d[WIDE], dz[WIDE];
      slopes.of(in.x, in.dy, with_silu, d, dz);
#pragma unroll
      for (int j = 0; j < WIDE; j++) {
        sum[j] += dz[j];
        product[j] += dz[j] * d[j];
      }
    };
    each_kept(slab, room, part, [&](int r) { add(kept_row(r)); });
    each_other<2>(slab, kept, other_row, [&](int, const Two &in) { add(in); });
  }
  {
    // factor = rstd w, so these are the group's sums times rstd.
    float centre[WIDE], slope[WIDE];
#pragma unroll
    for (int j = 0; j < WIDE; j++) {
      centre[j] = slopes.factor[j] * sum[j];
      slope[j] = slopes.factor[j] * product[j];
    }
    sums[threadIdx.x] = by_group(slab, centre, slope);
  }
  __syncthreads();
  cluster_wait(); // all have begun
  EACH_GROUP(g) give(slab, given, g, sum_of_group(slab, sums, g));
  cluster_arrive();
  if (partial) {
#pragma unroll
    for (int j = 0; j < WIDE; j++) product[j] *= slab.is_first(j) ? scale : next_scale;
    float *to = partial + (int64_t(blockIdx.z) * gridDim.x + blockIdx.x) * 2 * c + slab.channel;
    sum_channels(slab, to, scratch, sum);
    sum_channels(slab, to + c, scratch, product);
  }
  cluster_wait();
  if (!dx) return;
  const float inverse = 1.f / (float(hw) * float(slab.width));
  EACH_GROUP(g) {
    const float2 theirs = given_by(slab, given, g);
    const float2 total = {warp_sum(theirs.x), warp_sum(theirs.y)};
    if (threadIdx.x % 32 == 0) outcome[g] = {total.x * inverse, total.y * inverse};
  }
  __syncthreads();
  const float2 own_group = outcome[slab.group], next_group = outcome[min(slab.group + 1, slab.groups - 1)];
  float centre[WIDE], slope[WIDE];
#pragma unroll
  for (int j = 0; j < WIDE; j++) {
    const float r = slab.is_first(j) ? scale : next_scale;
    centre[j] = slab.is_first(j) ? own_group.x : next_group.x;
    slope[j] = r * r * (slab.is_first(j) ? own_group.y : next_group.y);
  }
  const auto write = [&](int r, const Two &in) {
    float d[WIDE], dz[WIDE];
    slopes.of(in.x, in.dy, with_silu, d, dz);
#pragma unroll
    for (int j = 0; j < WIDE; j++) dz[j] = dz[j] * slopes.factor[j] - centre[j] - d[j] * slope[j];
    put_chunk(dx + first + int64_t(r) * c, dz);
  };
  each_other<2>(slab, kept, other_row, write);
  each_row(slab, 0, room, [&](int r) { write(r, kept_row(r)); });
}
