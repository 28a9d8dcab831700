// The topk mix by segments: every expert meets the tokens that chose it, and no others.
#include "cuda/expand.cuh"
#include "cuda/segments.cuh"
#include "cuda/topk.cuh"

namespace moelora::cuda {
namespace {

// ---------------------------------------------------------------- shrink

// Grid: tiles of all segments x column tiles.
template <class T, bool kMasked>
__global__ void __launch_bounds__(32 * ShrinkTile<T>::kMostWarps, 1)
    shrink_segments_kernel(Shrink p, const Segments segments, const SegmentSums to) {
  extern __shared__ __align__(16) char shared[];
  using S = ShrinkTile<T>;
  using A = acc_t<T>;
  const int size = blockDim.x / 2, r = p.rows.R;
  const SegmentTile tile = load_tile(segments, blockIdx.x, size, 0, segments.k, shared);
  if (tile.expert == segments.E) return;
  advance<T>(p.rows.experts, tile.expert * r * p.columns);
  p.masks.first = tile.expert;
  const int c0 = blockIdx.y * S::kColumns, columns = min(r - c0, S::kColumns);
  A total[S::kTiles][4] = {};
  shrink_tile<T, kMasked>(p, tile.tokens(shared), 0, c0, columns, 0, p.columns,
                          reinterpret_cast<T*>(shared + SegmentTile::shared_bytes(size)), total);

  // A lane has sums of two pairs.
  const int at = tile.begin + warp_id() * 16 + lane_id() / 4;
  const bool exists[2] = {at < tile.end, at + 8 < tile.end};
  const int64_t pairs[2] = {exists[0] ? segments.order[at] : 0,
                            exists[1] ? segments.order[at + 8] : 0};
  const A* weights = static_cast<const A*>(to.weights);
  const A scale = static_cast<A>(to.scale), inv_keep = static_cast<A>(to.inv_keep);
  const A gates[2] = {to.mixed && exists[0] ? scale * weights[pairs[0]] : A(0),
                      to.mixed && exists[1] ? scale * weights[pairs[1]] : A(0)};
  const int ldm = static_cast<int>(padded(r));
  for_each_sum(total, [&](int row, int c, A sum) {
    const bool second = row >= 8;
    if (!(second ? exists[1] : exists[0])) return;
    const int64_t pair = second ? pairs[1] : pairs[0];
    const A hidden = inv_keep * sum;
    if (c < columns) static_cast<A*>(to.hidden)[pair * r + c0 + c] = hidden;
    if (to.mixed && c0 + c < ldm)
      static_cast<T*>(to.mixed)[pair * ldm + c0 + c] =
          static_cast<T>(c < columns ? (second ? gates[1] : gates[0]) * hidden : A(0));
  });
}

// ---------------------------------------------------------------- expand

// Grid: strips x walks over tiles of the slot's segments, and one block for the statistics if there
// are any.
//   size  of a tile, in whole steps of a walk
template <class T, bool kMasked>
__global__ void __launch_bounds__(32 * ExpandTile<T>::kWarps, 2)
    expand_segments_kernel(Expand p, const Segments segments, int slot, int strips, int size) {
  extern __shared__ __align__(16) char shared[];
  using S = ExpandTile<T>;
  if (p.statistics.blocks && blockIdx.x == gridDim.x - 1)
    return add_statistics<acc_t<T>>(p.statistics);
  const SegmentTile tile = load_tile(segments, blockIdx.x / strips, size, slot, 1, shared);
  if (tile.expert == segments.E) return;
  advance<T>(p.rows.experts, tile.expert * p.rows.R * p.columns);
  p.masks.first = tile.expert;
  const ListedTokens tokens = tile.tokens(shared);
  expand_walk<T, kMasked>(p, tokens, blockIdx.x % strips * S::kColumns, 0,
                          ceil_div<int64_t>(tokens.end, S::kTokens),
                          shared + SegmentTile::shared_bytes(size));
}

template <class T>
void launch_slot(const Expand& p, const Segments& segments, int slot, void* stream) {
  using S = ExpandTile<T>;
  constexpr int kMostSteps = 4;  // segments are short, and another expert's rows have to be read
  const int64_t strips = ceil_div<int64_t>(p.columns, S::kColumns);
  const int64_t steps = ceil_div<int64_t>(p.T, S::kTokens);
  const int64_t blocks = kExpandBlocks * current_device().multiprocessors;
  const int size =
      S::kTokens * static_cast<int>(std::clamp<int64_t>(steps * strips / blocks, 1, kMostSteps));
  const int64_t tiles = strips * most_tiles(segments, p.T, size);
  launch("expand_segments",
         p.masks.seed ? expand_segments_kernel<T, true> : expand_segments_kernel<T, false>,
         dim3(static_cast<unsigned>(tiles + (p.statistics.blocks ? 1 : 0))), 32 * S::kWarps,
         SegmentTile::shared_bytes(size) + S(p.rows).shared_bytes(), stream, p, segments, slot,
         static_cast<int>(strips), size);
}

// ---------------------------------------------------------------- mix, backward

template <class T>
struct BackwardMix {
  using A = acc_t<T>;
  GroupedBackward p;

  // tile [n, pitch]: dH' of a token's k experts without the scale
  //   scratch  dweights [k] | dlogits [E] | what topk_backward_row takes
  static __host__ __device__ constexpr int scratch_size(int E, int k) { return odd(3 * E + 2 * k); }
  __device__ void operator()(int64_t, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int E = p.E, r = p.r, k = p.k, size = scratch_size(E, k);
    const A* hidden = static_cast<const A*>(p.hidden) + t0 * k * r;
    const A* weights = static_cast<const A*>(p.weights) + t0 * k;
    const A scale = static_cast<A>(p.scale), inv_keep = static_cast<A>(p.inv_keep);
    for (int i = threadIdx.x; i < n * k; i += blockDim.x)
      scratch[i / k * size + i % k] =
          dweight_row(tile + i / k * pitch + i % k * r, hidden + i * r, r, scale);
    __syncthreads();
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      A* s = scratch + row * size;
      topk_backward_row(static_cast<const A*>(p.logits) + (t0 + row) * E, weights + row * k,
                        p.selected + (t0 + row) * k, s, static_cast<const A*>(p.dprob_sums), E, k,
                        p.renormalize, s + k + E, s + k);
    }
    __syncthreads();

    const int ldm = static_cast<int>(padded(r)), lde = static_cast<int>(padded(E));
    const int ldf = static_cast<int>(padded(r + E));
    const auto dlogit = [&](int row, int e) { return scratch[row * size + k + e]; };
    // Both uses of dH pass the mask, which therefore carries no 1 / (1 - p) of its own.
    const auto dhidden = [&](int row, int s, int j) {
      return inv_keep * (scale * weights[row * k + s]) * tile[row * pitch + s * r + j];
    };
    for_each(n, k * ldm, [&](int row, int c) {
      const int s = c / ldm, j = c % ldm;
      const int64_t at = ((t0 + row) * k + s) * ldm + j;
      static_cast<T*>(p.dhidden)[at] = static_cast<T>(j < r ? dhidden(row, s, j) : A(0));
      if (!p.mixed) return;
      const A gate = scale * weights[row * k + s];
      static_cast<T*>(p.mixed)[at] =
          static_cast<T>(j < r ? gate * hidden[(row * k + s) * r + j] : A(0));
    });
    if (p.first)
      for_each(n, ldf, [&](int row, int c) {
        const A value = c < r ? dhidden(row, 0, c) : c < r + E ? dlogit(row, c - r) : A(0);
        static_cast<T*>(p.first)[(t0 + row) * ldf + c] = static_cast<T>(value);
      });
    if (p.dlogits)
      for_each(n, lde, [&](int row, int e) {
        static_cast<T*>(p.dlogits)[(t0 + row) * lde + e] =
            static_cast<T>(e < E ? dlogit(row, e) : A(0));
      });
  }
};

}  // namespace

void launch_shrink_segments(DType dtype, const Shrink& p, const Segments& segments,
                            const SegmentSums& to, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ShrinkTile<T>;
    Shrink pairs = p;
    pairs.T *= segments.k;
    const int warps = plan_shrink(dtype, pairs, current_device()).warps, size = 16 * warps;
    launch("shrink_segments",
           p.masks.seed ? shrink_segments_kernel<T, true> : shrink_segments_kernel<T, false>,
           dim3(static_cast<unsigned>(most_tiles(segments, pairs.T, size)),
                ceil_div(p.rows.R, S::kColumns)),
           32 * warps, SegmentTile::shared_bytes(size) + S::shared_bytes(warps, p.rows.R), stream,
           p, segments, to);
  });
}

void launch_expand_segments(DType dtype, const Expand& p, const Segments& segments, const void* h,
                            void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch_slot<T>(p, segments, 0, stream);
    Expand next = p;
    next.rows.others = nullptr;
    next.rows.extra = 0;
    next.bias = nullptr;
    next.accumulate = true;
    next.statistics = {};
    next.ldh = segments.k * padded(p.rows.R);
    for (int slot = 1; slot < segments.k; ++slot) {
      next.h = static_cast<const T*>(h) + slot * padded(p.rows.R);
      launch_slot<T>(next, segments, slot, stream);
    }
  });
}

void launch_mix(DType dtype, int64_t T, const void* dmixed, const GroupedBackward& mix,
                void* stream) {
  dispatch(dtype, [&](auto type) {
    using Element = typename decltype(type)::type;
    using A = acc_t<Element>;
    const int columns = mix.k * mix.r;
    const int64_t bytes =
        (odd(columns) + BackwardMix<Element>::scratch_size(mix.E, mix.k)) * sizeof(A);
    const int tokens = mix_tokens(T, bytes, current_device());
    launch("topk_backward", mix_kernel<A, BackwardMix<Element>>,
           dim3(static_cast<unsigned>(ceil_div<int64_t>(T, tokens))), 32 * kMixWarps,
           tokens * bytes, stream, static_cast<const A*>(dmixed), 1, T, columns, tokens, {mix});
  });
}

}  // namespace moelora::cuda
