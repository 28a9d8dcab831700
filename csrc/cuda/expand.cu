// Expand, and the rounding of its coefficients.
#include "cuda/expand.cuh"

namespace moelora::cuda {
namespace {

// The plan that moves the fewest bytes while nine in ten multiprocessors have their warps: blocks
// of several strips read coefficients less often, long walks rows.
template <class T>
ExpandPlan plan_expand(const Expand& p, Device device) {
  using S = ExpandTile<T>;
  const int64_t columns = ceil_div<int64_t>(p.columns, S::kColumns);
  ExpandPlan best = {};
  int64_t least = 0;
  for (int warps = S::kWarps; warps <= S::kMostWarps; warps *= 2)
    for (int strips = 1; strips <= S::kMostStrips; strips *= 2) {
      const S shape(p.rows, warps, strips);
      const bool usual = warps == S::kWarps && strips == 1;
      const int64_t tiles = ceil_div<int64_t>(p.T, shape.tokens());
      const int64_t across = ceil_div<int64_t>(columns, strips) * p.batch.count;
      const int at_once = S::kMostWarps / warps;
      const int64_t wanted = int64_t{at_once} * device.multiprocessors;
      const int64_t most = std::clamp<int64_t>(wanted / std::max<int64_t>(across, 1), 1, tiles);
      const int64_t per_walk = ceil_div(tiles, most), walks = ceil_div(tiles, per_walk);
      const bool enough = device.filled_by(across * walks, at_once);
      const bool fits = shape.shared_bytes() * at_once <= device.shared_bytes;
      if (!usual && !(enough && fits && (strips == 1 || shape.resident()))) continue;
      const int64_t readings = p.batch.count * (shape.resident() ? walks : tiles);
      const int64_t moved = across * p.T + readings * p.columns;
      if (usual || moved < least) {
        least = moved;
        best = {warps, strips, per_walk};
      }
    }
  return best;
}

// Grid: blocks side by side x walks of all products, and one block for the statistics if there are
// any.
template <class T, bool kMasked>
__global__ void __launch_bounds__(32 * ExpandTile<T>::kMostWarps, 1)
    expand_kernel(const Expand p, int across, const ExpandPlan plan) {
  extern __shared__ __align__(16) char shared[];
  expand_block<T, kMasked>(p, blockIdx.x, across, plan, shared);
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
    const ExpandPlan plan = plan_expand<T>(p, current_device());
    const S shape(p.rows, plan.warps, plan.strips);
    const int64_t across = ceil_div<int64_t>(p.columns, plan.strips * S::kColumns);
    const int64_t tiles = ceil_div<int64_t>(p.T, shape.tokens());
    const int64_t blocks = across * p.batch.count * ceil_div(tiles, plan.tiles_per_walk);
    const auto kernel = p.masks.seed ? expand_kernel<T, true> : expand_kernel<T, false>;
    launch("expand", kernel, dim3(static_cast<unsigned>(blocks + (p.statistics.blocks ? 1 : 0))),
           32 * plan.warps, shape.shared_bytes(), stream, p, static_cast<int>(across), plan);
  });
}

}  // namespace moelora::cuda
