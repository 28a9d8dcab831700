// Tables of weights whose rows tokens share.
#pragma once

#include <cstdint>

#include "mix/host_device.h"

namespace moelora {

// Which row of a table a token reads.
struct RowMap {
  const int32_t* map;      // [T], or null: tokens in equal runs
  int64_t tokens_per_row;  // length of a run
  MOELORA_HD int64_t operator()(int64_t t) const { return map ? map[t] : t / tokens_per_row; }
};

}  // namespace moelora
