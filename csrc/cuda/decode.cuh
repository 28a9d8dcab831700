// A mix between a shrink and an expand.  Of a handful of tokens the expand's blocks mix, each by
// itself, from the shrink's partial sums, which spares a launch.
#pragma once

#include "cuda/expand.cuh"
#include "cuda/mix.cuh"

namespace moelora::cuda {

// Grid: the strips of all products, and one more block, which saves what the mix leaves behind.
//   mix.p.mixed [gridDim.x, T, ldh]: each block's own;  mix.save_nothing()
template <class T, class Mix>
__global__ void __launch_bounds__(32 * kMixWarps, 2)
    mix_and_expand_kernel(const acc_t<T>* partials, int parts, int columns, Mix mix, Expand p,
                          int strips) {
  static_assert(kMixWarps == ExpandTile<T>::kWarps);
  extern __shared__ __align__(16) char shared[];
  const bool saves = blockIdx.x == gridDim.x - 1;
  advance<T>(mix.p.mixed, blockIdx.x * p.T * p.ldh);
  if (!saves) mix.save_nothing();
  mix_parts(partials, parts, p.T, columns, mix, 0, 0, static_cast<int>(p.T), shared);
  __syncthreads();
  p.h = mix.p.mixed;
  expand_block<T, false>(p, blockIdx.x, strips, {kMixWarps, 1, 1}, shared);
}

// From x to y, in the launches of the plan.  Functor<T> has `mix` in it.
template <template <class> class Functor, class Mix>
void launch_between(const char* name, DType dtype, const Shrink& shrink, const Mix& mix,
                    const ShrinkPlan& plan, Expand expand, void* stream) {
  expand.h = mix.mixed;
  if (!plan.few) {
    launch_behind_shrink<Functor>(name, dtype, shrink, mix, plan, stream);
    return launch_expand(dtype, expand, stream);
  }
  launch_partials(dtype, shrink, plan, stream);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if constexpr (kExpands<T>)
      launch(name, mix_and_expand_kernel<T, Functor<T>>, dim3(static_cast<unsigned>(plan.copies)),
             32 * kMixWarps,
             std::max(ExpandTile<T>(expand.rows).shared_bytes(), expand.T * row_bytes(dtype, mix)),
             stream, static_cast<const acc_t<T>*>(shrink.partials), plan.parts,
             static_cast<int>(shrink.columns_of_h()), {mix}, expand,
             static_cast<int>(expand_strips(dtype, expand)));
  });
}

}  // namespace moelora::cuda
