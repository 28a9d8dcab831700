// Dropout masks for vector code: masked copies of rows, and mask factors for a column block.
#pragma once

#include "cpu/vec.h"
#include "mix/philox.h"

namespace moelora {
namespace MOELORA_LEVEL {

// keep[i] = ~0 where feature 8 * group + i of this token and expert is kept, else 0, for 8 *
// kGroups features.
template <int kGroups>
MOELORA_INLINE void keep_words(const Dropout& d, uint32_t group, int64_t token, uint32_t expert,
                               uint16_t* keep) {
  uint32_t words[4][kGroups];
  philox_words<kGroups>(d, group, static_cast<uint64_t>(token), expert, words);
  for (int l = 0; l < kGroups; ++l)
    for (int w = 0; w < 4; ++w) {
      keep[8 * l + 2 * w] = (words[w][l] & 0xFFFF) >= d.threshold ? 0xFFFF : 0;
      keep[8 * l + 2 * w + 1] = (words[w][l] >> 16) >= d.threshold ? 0xFFFF : 0;
    }
}

// out[i] = x[c0 + i] where kept, else 0, for features [c0, c1); c0 is a multiple of 8.
template <class T>
void masked_copy(const Dropout& d, const T* x, int64_t token, int expert, int64_t c0, int64_t c1,
                 T* out) {
  constexpr int kGroups = 16;
  uint16_t keep[8 * kGroups];
  for (int64_t c = c0; c < c1; c += 8 * kGroups) {
    keep_words<kGroups>(d, static_cast<uint32_t>(c / 8), token, expert, keep);
    const int n = static_cast<int>(c1 - c < 8 * kGroups ? c1 - c : 8 * kGroups);
    for (int i = 0; i < n; ++i) out[c - c0 + i] = keep[i] ? x[c + i] : T{};
  }
}

// factors[i] = 1 where feature c0 + i is kept, else 0, for kColumns features.
template <int kColumns, class A>
void mask_factors(const Dropout& d, int64_t token, int expert, int64_t c0, A* factors) {
  uint16_t keep[kColumns];
  keep_words<kColumns / 8>(d, static_cast<uint32_t>(c0 / 8), token, expert, keep);
  for (int i = 0; i < kColumns; ++i) factors[i] = keep[i] ? A(1) : A(0);
}

}  // namespace MOELORA_LEVEL
}  // namespace moelora
