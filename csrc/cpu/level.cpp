// The CPU kernels of one ISA level.  setup.py compiles this file once per level with that level's
// flags and -DMOELORA_LEVEL=<name>; everything it includes lives in a namespace of that name.

#include "cpu/cosines.h"
#include "cpu/dense.h"
#include "cpu/kernels.h"
#include "cpu/linear.h"
#include "cpu/topk.h"

namespace moelora {
namespace MOELORA_LEVEL {

template <class T>
static constexpr Kernels table() {
  using K = TopkKernels<T>;
  return {dense_table<T>(),
          K::tokens,
          K::expand,
          K::logits,
          K::route,
          K::hidden,
          K::backward_tokens,
          K::backward_down,
          K::backward_up,
          linear<T>,
          linear_backward<T>,
          small_linear<T>,
          kSmallLinearTokens<T>,
          CosineKernels<T>::forward,
          CosineKernels<T>::backward};
}

extern const Kernels kTables[4] = {table<float>(), table<BFloat16>(), table<Float16>(),
                                   table<double>()};

}  // namespace MOELORA_LEVEL
}  // namespace moelora
