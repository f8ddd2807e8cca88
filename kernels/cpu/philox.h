// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): four random words from a counter
// and a key. A stream's counter is (place as 64 bits, stream, 0); engine/philox.ts draws the same words.
#pragma once
#include <cstdint>

namespace sdxl {
namespace ARCH {
namespace {

struct Four {
  uint32_t at[4];
};

inline Four philox(Four counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; round++) {
    const uint64_t a = uint64_t(0xd2511f53u) * counter.at[0], b = uint64_t(0xcd9e8d57u) * counter.at[2];
    counter = Four{{uint32_t(b >> 32) ^ counter.at[1] ^ key0, uint32_t(b),
                    uint32_t(a >> 32) ^ counter.at[3] ^ key1, uint32_t(a)}};
    key0 += 0x9e3779b9u;
    key1 += 0xbb67ae85u;
  }
  return counter;
}

} // namespace
} // namespace ARCH
} // namespace sdxl
