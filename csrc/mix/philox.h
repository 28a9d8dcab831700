// Counter-based dropout masks: Philox4x32-10 (Salmon et al., SC 2011).
//
// The layout of the counter is defined by moelora_ops/reference/philox.py: feature i of token t
// under expert e reads the low (i even) or high (i odd) 16 bits of word (i % 8) / 2 of
//     philox4x32_10(key = (seed low, seed high), counter = (i / 8, t low, e, t high)).
#pragma once

#include <cstdint>

#include "mix/host_device.h"

namespace moelora {

struct Dropout {
  uint32_t key0, key1;
  uint32_t threshold;  // drop where the 16 random bits are below
  double inv_keep;     // 1 / (1 - p)
};

MOELORA_HD Dropout make_dropout(int64_t seed, double p) {
  const uint64_t bits = static_cast<uint64_t>(seed);
  return {static_cast<uint32_t>(bits), static_cast<uint32_t>(bits >> 32),
          static_cast<uint32_t>(p * 65536 + 0.5), 1 / (1 - p)};
}

// Ten rounds on `kLanes` counters that differ in their first word: c0[l] = group + l.  The lane
// loops are what compilers vectorise on the CPU; a CUDA thread takes kLanes = 1.
template <int kLanes>
MOELORA_HD void philox_words(const Dropout& d, uint32_t group, uint64_t token, uint32_t expert,
                             uint32_t words[4][kLanes]) {
  for (int l = 0; l < kLanes; ++l) {
    words[0][l] = group + l;
    words[1][l] = static_cast<uint32_t>(token);
    words[2][l] = expert;
    words[3][l] = static_cast<uint32_t>(token >> 32);
  }
  uint32_t k0 = d.key0, k1 = d.key1;
  for (int round = 0; round < 10; ++round) {
    for (int l = 0; l < kLanes; ++l) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * words[0][l];
      const uint64_t p1 = uint64_t{0xCD9E8D57u} * words[2][l];
      words[0][l] = static_cast<uint32_t>(p1 >> 32) ^ words[1][l] ^ k0;
      words[2][l] = static_cast<uint32_t>(p0 >> 32) ^ words[3][l] ^ k1;
      words[1][l] = static_cast<uint32_t>(p1);
      words[3][l] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace moelora
