// Expand, and the rounding of its coefficients.
#include "cuda/expand.cuh"

namespace moelora::cuda {
namespace {

// Grid: strips x walks of all products, and one block for the statistics if there are any.
template <class T, bool kMasked>
__global__ void __launch_bounds__(32 * ExpandTile<T>::kWarps, 2)
    expand_kernel(const Expand p, int strips, int64_t tiles_per_walk) {
  extern __shared__ __align__(16) char shared[];
  expand_block<T, kMasked>(p, blockIdx.x, strips, tiles_per_walk, shared);
}

template <class T>
__global__ void __launch_bounds__(kFlatThreads)
    round_kernel(const acc_t<T>* from, int64_t tokens, int columns, T* to) {
  const int64_t ld = padded(columns);
  for_each_flat(tokens * ld, [&](int64_t i) {
    const int64_t c = i % ld;
    to[i] = static_cast<T>(c < columns ? from[i / ld * columns + c] : acc_t<T>(0));
  });
}

}  // namespace

int64_t expand_strips(DType dtype, const Expand& p) {
  int64_t strips = 0;
  dispatch(dtype, [&](auto type) {
    strips = ceil_div<int64_t>(p.columns, ExpandTile<typename decltype(type)::type>::kColumns);
  });
  return strips;
}

void launch_round(DType dtype, int64_t T, int columns, const void* from, void* to, void* stream) {
  dispatch(dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    launch("round", round_kernel<Element>, flat_grid(T * padded(columns)), kFlatThreads, 0, stream,
           static_cast<const acc_t<Element>*>(from), T, columns, static_cast<Element*>(to));
  });
}

void launch_expand(DType dtype, const Expand& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ExpandTile<T>;
    const int64_t strips = expand_strips(dtype, p);
    const int64_t tiles = ceil_div<int64_t>(p.T, S::kTokens);
    // Long walks read the rows less often; but every multiprocessor should have its blocks.
    const int64_t blocks = int64_t{kExpandBlocks} * current_device().multiprocessors;
    const int64_t per_walk = ceil_div(
        tiles,
        std::clamp<int64_t>(blocks / std::max<int64_t>(strips * p.batch.count, 1), 1, tiles));
    const int64_t walks = p.batch.count * ceil_div(tiles, per_walk);
    const auto kernel = p.masks.seed ? expand_kernel<T, true> : expand_kernel<T, false>;
    launch("expand", kernel,
           dim3(static_cast<unsigned>(strips * walks + (p.statistics.blocks ? 1 : 0))),
           32 * S::kWarps, S(p.rows).shared_bytes(), stream, p, static_cast<int>(strips), per_walk);
  });
}

}  // namespace moelora::cuda
