// The CPU kernels of one ISA level.  setup.py compiles this file once per level with that level's
// flags and -DMOELORA_LEVEL=<name>; everything it includes lives in a namespace of that name.

#include "cpu/dense.h"
#include "cpu/kernels.h"
#include "cpu/topk.h"

namespace moelora {
namespace MOELORA_LEVEL {

template <class T>
static void small_linear_any(const void* x, int64_t ldx, int64_t tokens, const void* weight,
                             int64_t ldw, const void* bias, int64_t K, int64_t n0, int64_t n1,
                             void* y, int64_t ldy) {
  small_linear<T>(static_cast<const T*>(x), ldx, tokens, static_cast<const T*>(weight), ldw,
                  static_cast<const T*>(bias), K, n0, n1, static_cast<T*>(y), ldy);
}

template <class T>
static constexpr Kernels table() {
  using K = TopkKernels<T>;
  return {dense_table<T>(), K::tokens,          K::expand,          K::logits,
          K::route,         K::hidden,          K::backward_tokens, K::backward_down,
          K::backward_up,   small_linear_any<T>};
}

extern const Kernels kTables[4] = {table<float>(), table<BFloat16>(), table<Float16>(),
                                   table<double>()};

}  // namespace MOELORA_LEVEL
}  // namespace moelora
