// Routing of the grouped topk mix: from logits to choices, and to the order in which every expert
// finds its tokens.
#include "cuda/segments.cuh"
#include "cuda/topk.cuh"

namespace moelora::cuda {
namespace {

template <class A>
struct Scratch {
  A *weights, *probs;
  int32_t* selected;

  static __host__ __device__ constexpr int size(int E, int k) { return odd(E + 2 * k); }
  __device__ Scratch(A* scratch, int row, int E, int k) {
    weights = scratch + row * size(E, k);
    selected = reinterpret_cast<int32_t*>(weights + k);
    probs = weights + 2 * k;
  }
};

template <class T>
struct RoutingMix {
  using A = acc_t<T>;
  TopkRouting p;

  // tile [n, pitch]: logits
  __device__ void operator()(int64_t block, int64_t t0, int n, const A* tile, int pitch,
                             A* scratch) const {
    const int E = p.E, k = p.k;
    const auto row_scratch = [&](int row) { return Scratch<A>(scratch, row, E, k); };
    for (int row = threadIdx.x; row < n; row += blockDim.x) {
      const Scratch<A> s = row_scratch(row);
      topk_forward_row(tile + row * pitch, E, k, p.renormalize, s.selected, s.weights, s.probs);
    }
    __syncthreads();
    save_routing(p, block, t0, n, tile, pitch, row_scratch);
    for (int i = threadIdx.x; i < k * E; i += blockDim.x) {
      int32_t count = 0;
      for (int row = 0; row < n; ++row) count += row_scratch(row).selected[i / E] == i % E;
      p.count_partials[block * k * E + i] = count;
    }
  }
};

// A thread an expert, which walks the choices: no atomics, and one order.
constexpr int kSortThreads = 256;
// Blocks of a slot; each reads what all tiles have counted.
constexpr int kSortParts = 32;

struct Sort {
  int64_t T, tiles, tiles_of_part;
  int tile_tokens;
  const int32_t* selected;     // [T, k]
  const int32_t* tile_counts;  // [tiles, k, E]
  Segments segments;
  int64_t* counts;  // [E]

  int64_t shared_bytes() const { return (2 * segments.E + 2 * kSortThreads) * sizeof(int32_t); }
};

// Pairs of each expert: all, and those before the part's own, of which first those of slots before.
//   all, before [E];  lanes [2 kSortThreads]
__device__ __forceinline__ void count_pairs(const Sort& p, int64_t first_tile, int slot, int* all,
                                            int* before, int* lanes) {
  const int E = p.segments.E, k = p.segments.k;
  int width = 1;
  while (width < min(E, kSortThreads)) width *= 2;
  const int column = threadIdx.x % width, lane = threadIdx.x / width;
  for (int e = column; e < ceil_div(E, width) * width; e += width) {
    int own_all = 0, own_before = 0;
    for (int64_t tile = lane; e < E && tile < p.tiles; tile += kSortThreads / width)
      for (int s = 0; s < k; ++s) {
        const int count = p.tile_counts[(tile * k + s) * E + e];
        own_all += count;
        if (s < slot || (s == slot && tile < first_tile)) own_before += count;
      }
    __syncthreads();  // the last columns were read
    lanes[threadIdx.x] = own_all;
    lanes[kSortThreads + threadIdx.x] = own_before;
    __syncthreads();
    if (lane == 0 && e < E) {
      all[e] = before[e] = 0;
      for (int i = column; i < kSortThreads; i += width) {
        all[e] += lanes[i];
        before[e] += lanes[kSortThreads + i];
      }
    }
  }
  __syncthreads();
}

// Grid: parts of the tokens x slots.
__global__ void __launch_bounds__(kSortThreads) sort_kernel(const Sort p) {
  extern __shared__ __align__(16) char shared[];
  const int E = p.segments.E, k = p.segments.k, slot = blockIdx.y;
  const int64_t first_tile = blockIdx.x * p.tiles_of_part;
  int32_t* all = reinterpret_cast<int32_t*>(shared);
  int32_t* place = all + E;  // where each expert's next pair goes
  int32_t* experts = place + E;
  count_pairs(p, first_tile, slot, all, place, experts);
  if (warp_id() == 0)
    for (int e0 = 0, before = 0; e0 < E; e0 += 32) {
      const int e = e0 + lane_id(), own = e < E ? all[e] : 0, after = before + sum_to_lane(own);
      if (e < E) place[e] += after - own;
      before = __shfl_sync(~0u, after, 31);
    }
  __syncthreads();

  for (int e = threadIdx.x; blockIdx.x == 0 && e < E; e += kSortThreads) {
    p.segments.starts[static_cast<int64_t>(e) * k + slot] = place[e];
    if (slot > 0) continue;
    p.counts[e] = all[e];
    if (e == 0) p.segments.starts[static_cast<int64_t>(E) * k] = static_cast<int32_t>(p.T * k);
  }
  const int64_t begin = first_tile * p.tile_tokens;
  const int64_t end = min(p.T, begin + p.tiles_of_part * p.tile_tokens);
  for (int64_t t0 = begin; t0 < end; t0 += kSortThreads) {
    const int n = static_cast<int>(min(end - t0, int64_t{kSortThreads}));
    __syncthreads();  // the last ones were read
    if (threadIdx.x < n) experts[threadIdx.x] = p.selected[(t0 + threadIdx.x) * k + slot];
    __syncthreads();
    for (int e = threadIdx.x; e < E; e += kSortThreads) {
      int at = place[e];
      for (int i = 0; i < n; ++i)
        if (experts[i] == e) p.segments.order[at++] = static_cast<int32_t>((t0 + i) * k + slot);
      place[e] = at;
    }
  }
}

}  // namespace

int64_t row_bytes(DType dtype, const TopkRouting& mix) {
  return (odd(mix.E) + Scratch<float>::size(mix.E, mix.k)) * accumulator_size(dtype);
}

void launch_mix(DType dtype, const Shrink& p, const TopkRouting& mix, const ShrinkPlan& plan,
                void* stream) {
  launch_behind_shrink<RoutingMix>("route", dtype, p, mix, plan, stream);
}

void launch_sort(const TopkRouting& p, int64_t T, const ShrinkPlan& plan, const Segments& segments,
                 int64_t* counts, void* stream) {
  const Sort sort = {T,
                     plan.mix_blocks,
                     ceil_div<int64_t>(plan.mix_blocks, kSortParts),
                     plan.mix_tokens,
                     p.selected,
                     p.count_partials,
                     segments,
                     counts};
  const dim3 grid(static_cast<unsigned>(ceil_div(sort.tiles, sort.tiles_of_part)), segments.k);
  launch("sort", sort_kernel, grid, kSortThreads, sort.shared_bytes(), stream, sort);
}

}  // namespace moelora::cuda
