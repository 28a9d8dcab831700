// A handful of tokens: a shrink into partial sums, and an expand whose every block adds and mixes
// them by itself, which spares a launch.
#pragma once

#include "cuda/expand.cuh"
#include "cuda/mix.cuh"

namespace moelora::cuda {

// Grid: the strips, and one more block, which saves what the mix leaves behind.
//   mix.p.mixed [gridDim.x, T, ldh]: each block's own;  mix.save_nothing()
template <class T, class Mix>
__global__ void __launch_bounds__(32 * kMixWarps, 2)
    mix_and_expand_kernel(const acc_t<T>* partials, int parts, int columns, Mix mix, Expand p) {
  static_assert(kMixWarps == ExpandTile<T>::kWarps);
  extern __shared__ __align__(16) char shared[];
  const int strips = static_cast<int>(gridDim.x) - 1;
  const bool saves = blockIdx.x == strips;
  advance<T>(mix.p.mixed, blockIdx.x * p.T * p.ldh);
  if (!saves) mix.save_nothing();
  mix_parts(partials, parts, p.T, columns, mix, 0, 0, static_cast<int>(p.T), shared);
  __syncthreads();
  p.h = mix.p.mixed;
  expand_block<T, false>(p, blockIdx.x, strips, 1, shared);
}

// Functor<T> has `mix` in it.
template <template <class> class Functor, class Mix>
void launch_mix_and_expand(const char* name, DType dtype, const Shrink& shrink, const Mix& mix,
                           const ShrinkPlan& plan, const Expand& p, void* stream) {
  launch_partials(dtype, shrink, plan, stream);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t bytes =
        std::max(ExpandTile<T>(p.rows).shared_bytes(), p.T * row_bytes(dtype, mix));
    launch(name, mix_and_expand_kernel<T, Functor<T>>,
           dim3(static_cast<unsigned>(decode_blocks(dtype, p))), 32 * kMixWarps, bytes, stream,
           static_cast<const acc_t<T>*>(shrink.partials), plan.parts, shrink.rows.count(), {mix},
           p);
  });
}

}  // namespace moelora::cuda
