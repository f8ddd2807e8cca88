// What every optimizer's kernel shares: reading a weight and writing it back. A weight lies in its storage type T, with a
// float32 master beside it or none; without one, bfloat16 may be rounded up or down at random, with the odds that keep
// the mean (stochastic rounding), from 16 bits per element of a Philox stream. bfloat16 moments always are.
#pragma once
#include "each.h"
#include "philox.h"

namespace sdxl {
namespace ARCH {
namespace {

struct Rounding {
  int stochastic;
  uint32_t seed_low, seed_high, stream;
};

// Which of an element's numbers random bits are for: each has a Philox block of its own, the last word of its counter.
enum Drawn : uint32_t { WEIGHT, FIRST_MOMENT, SECOND_MOMENT };

// 16 random bits for each element from i on (a multiple of LANES): eight elements to a block of four words.
inline vu random_bits(const Rounding &rounding, int64_t i, Drawn drawn) {
  vu bits = {};
  Four words = {};
  for (int lane = 0; lane < LANES; lane++) {
    const uint64_t at = uint64_t(i + lane), block = at / 8;
    if (lane == 0 || at % 8 == 0)
      words = philox({{uint32_t(block), uint32_t(block >> 32), rounding.stream, drawn}}, rounding.seed_low, rounding.seed_high);
    bits[lane] = words.at[at % 8 / 2] >> (at % 2 * 16) & 0xffffu;
  }
  return bits;
}

inline void store_stochastic(bf16 *p, vf x, vu random, int64_t count) {
  const vu bits = bit_cast<vu>(x);
  const vu finite = (bits & 0x7f800000u) != 0x7f800000u ? bits + random : bits;
  // A NaN whose bits all lie below the cut would turn into an infinity.
  const vu nan = (bits & 0x7fffffffu) > 0x7f800000u ? vu{} + 0x400000u : vu{};
  store(p, bit_cast<vf>((finite | nan) & 0xffff0000u), count);
}

inline void store_moment(float *p, vf x, const Rounding &, int64_t, Drawn, int64_t count) { store(p, x, count); }
inline void store_moment(bf16 *p, vf x, const Rounding &rounding, int64_t i, Drawn drawn, int64_t count) {
  store_stochastic(p, x, random_bits(rounding, i, drawn), count);
}

template <class T> struct Weights {
  T *weight;
  float *master;
  Rounding rounding;

  vf read(int64_t i, int64_t count) const { return master ? load(master + i, count) : load(weight + i, count); }

  void write(int64_t i, vf x, int64_t count) const {
    if (master) store(master + i, x, count);
    if constexpr (__is_same(T, bf16)) {
      if (!master && rounding.stochastic) return store_stochastic(weight + i, x, random_bits(rounding, i, WEIGHT), count);
    }
    store(weight + i, x, count);
  }
};

template <class T>
Weights<T> weights_of(T *weight, float *master, int stochastic, int seed_low, int seed_high, int stream) {
  return {weight, master, {stochastic, uint32_t(seed_low), uint32_t(seed_high), uint32_t(stream)}};
}

} // namespace
} // namespace ARCH
} // namespace sdxl
