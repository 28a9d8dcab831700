// Averaged factors, merged for each row of a table of weights, so that a token meets r rows instead
// of E r: the merging, the shrink with it, and its gradients.  A factor is taken as flat, r times
// its columns numbers for each expert.
#include "cuda/decode.cuh"

namespace moelora::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroup = 8;  // of merged factors that share a reading of the experts', or the reverse

template <int kWidth, class V, class A>
__device__ __forceinline__ void load(const V* from, A (&to)[kWidth]) {
  if constexpr (kWidth == 1) {
    to[0] = static_cast<A>(*from);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += kChunk<V>) {
      const Chunk<V> chunk = load_global(from + i);
#pragma unroll
      for (int j = 0; j < kChunk<V>; ++j) to[i + j] = static_cast<A>(chunk.v[j]);
    }
  }
}
template <int kWidth, class T, class A>
__device__ __forceinline__ void store(T* to, const A (&sums)[kWidth], A scale) {
  if constexpr (kWidth == 1) {
    *to = static_cast<T>(scale * sums[0]);
  } else {
    Chunk<T> chunk;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) chunk.v[j] = static_cast<T>(scale * sums[j]);
    store_global(to, chunk);
  }
}

template <class T>
__host__ __device__ int64_t blocks_of(const Merged& p, const Merged::Factor& factor) {
  return ceil_div<int64_t>(p.r * factor.columns, kThreads * kChunk<T>);
}

// Whether chunks of a factor have one weight, and are aligned there and in the other one.
template <class T>
__device__ __forceinline__ bool is_wide(const Merged& p, const Merged::Factor& factor,
                                        const void* other) {
  return factor.columns / p.splits % kChunk<T> == 0 &&
         aligned16(static_cast<const T*>(factor.experts)) &&
         aligned16(static_cast<const T*>(other));
}

// f(std::integral_constant<int, width>, i): a block's share of a factor, `width` numbers from i on,
// which have the same weight.
template <class T, class F>
__device__ __forceinline__ void for_chunks(const Merged& p, const Merged::Factor& factor,
                                           const void* other, int64_t block, const F& f) {
  const int64_t flat = p.r * factor.columns, first = block * kThreads * kChunk<T>;
  if (is_wide<T>(p, factor, other)) {
    const int64_t i = first + threadIdx.x * kChunk<T>;
    if (i < flat) f(std::integral_constant<int, kChunk<T>>{}, i);
    return;
  }
  for (int64_t i = first + threadIdx.x; i < min(flat, first + kThreads * kChunk<T>); i += kThreads)
    f(std::integral_constant<int, 1>{}, i);
}

// A row's weights where a factor's flat index is i.
template <class A>
__device__ __forceinline__ const A* weights_at(const Merged& p, const Merged::Factor& factor,
                                               int64_t row, int64_t i) {
  const int64_t split = i % factor.columns / (factor.columns / p.splits);
  return static_cast<const A*>(p.weights) + (row * p.splits + split) * p.E;
}

// sums [kRows, kWidth] over all `count` of weight(i, k) values(k).
//   load_values(k, values)
template <int kRows, int kWidth, class A, class Load, class Weight>
__device__ __forceinline__ void weigh(int64_t count, A (&sums)[kRows][kWidth],
                                      const Load& load_values, const Weight& weight) {
#pragma unroll kRows == 1 ? 8 : 1
  for (int64_t k = 0; k < count; ++k) {
    A values[kWidth];
    load_values(k, values);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const A w = weight(i, k);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] = fma(w, values[j], sums[i][j]);
    }
  }
}

// kWidth merged numbers, from the flat index f on, for each of kRows rows of the table.
template <class T, int kRows, int kWidth>
__device__ __forceinline__ void merge(const Merged& p, bool up, int64_t first, int64_t f) {
  using A = acc_t<T>;
  const Merged::Factor& factor = up ? p.up : p.down;
  const int64_t flat = p.r * factor.columns;
  const A* weights = weights_at<A>(p, factor, first, f);
  A sums[kRows][kWidth] = {};
  weigh(
      p.E, sums,
      [&](int64_t e, A(&row)[kWidth]) {
        load(static_cast<const T*>(factor.experts) + e * flat + f, row);
      },
      [&](int i, int64_t e) {
        return first + i < p.rows ? weights[i * p.splits * p.E + e] : A(0);
      });
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (first + i < p.rows)
      store(static_cast<T*>(factor.merged) + (first + i) * flat + f, sums[i],
            up ? static_cast<A>(p.scale) : A(1));
}

// Grid: the chunks of both factors x groups of the table's rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(const Merged p) {
  const int64_t before = blocks_of<T>(p, p.down), all = before + blocks_of<T>(p, p.up);
  const int64_t block = blockIdx.x % all, first = blockIdx.x / all * kGroup;
  const bool up = block >= before;
  const Merged::Factor& factor = up ? p.up : p.down;
  for_chunks<T>(p, factor, factor.merged, up ? block - before : block, [&](auto width, int64_t f) {
    merge<T, kGroup, decltype(width)::value>(p, up, first, f);
  });
}

// A block's own share of a row's merged factor: rows [j0, j1) of it by columns [k0, k1), k0 a
// multiple of a chunk.  Ends with a barrier.
template <class T>
__device__ __forceinline__ void merge_own(const Merged& p, bool up, int64_t row, int j0, int j1,
                                          int64_t k0, int64_t k1) {
  const Merged::Factor& factor = up ? p.up : p.down;
  const auto merge_all = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t chunks = (k1 - k0) / kWidth;
    for (int64_t i = threadIdx.x; i < (j1 - j0) * chunks; i += blockDim.x)
      merge<T, 1, kWidth>(p, up, row,
                          (j0 + i / chunks) * factor.columns + k0 + i % chunks * kWidth);
  };
  if (is_wide<T>(p, factor, factor.merged))
    merge_all(std::integral_constant<int, kChunk<T>>{});
  else
    merge_all(std::integral_constant<int, 1>{});
  __syncthreads();
}

// Of few tokens, a shrink merges the rows that it meets.
template <class T>
struct MergeRows : WritePartials<acc_t<T>> {
  Merged factors;

  explicit MergeRows(const Merged& factors) : factors(factors) {}
  __device__ __forceinline__ void make_rows(int64_t row, int c0, int columns, int64_t k0,
                                            int64_t k1) const {
    merge_own<T>(factors, false, row, c0, c0 + columns, k0, k1);
  }
};

// And an expand those that it meets, and adds the parts of hidden.
// Grid: strips of the columns x rows of the table, each with p.T tokens.
//   partials A [parts, p.T, rows, r];  to.low [strips, rows, p.T, ldh]: each block's own
template <class T>
__global__ void __launch_bounds__(32 * ExpandTile<T>::kWarps, 2)
    merge_and_expand_kernel(const acc_t<T>* partials, int parts, const Merged factors,
                            const MergedHidden to, Expand p, int strips) {
  extern __shared__ __align__(16) char shared[];
  using A = acc_t<T>;
  const int strip = static_cast<int>(blockIdx.x) % strips, r = factors.r;
  const int64_t row = blockIdx.x / strips, n0 = int64_t{strip} * ExpandTile<T>::kColumns;
  T* low = static_cast<T*>(to.low) + strip * factors.rows * p.T * p.ldh;
  for (int i = threadIdx.x; i < p.T * p.ldh; i += blockDim.x) {
    const int64_t t = i / p.ldh, c = i % p.ldh, token = row * p.T + t;
    A sum = 0;
    if (c < r) {
      sum = add_parts(partials, parts, p.T * factors.rows * r, (t * factors.rows + row) * r + c);
      if (strip == 0) static_cast<A*>(to.hidden)[token * r + c] = sum;
    }
    low[token * p.ldh + c] = static_cast<T>(sum);
  }
  merge_own<T>(factors, true, row, 0, r, n0, min(p.columns, n0 + ExpandTile<T>::kColumns));
  p.h = low;
  expand_block<T, false>(p, blockIdx.x, strips, {ExpandTile<T>::kWarps, 1, 1}, shared);
}

// What shrinks with merged factors leave behind.
template <class T>
struct WriteHidden {
  using A = acc_t<T>;
  MergedHidden to;

  template <int kTiles>
  __device__ __forceinline__ void operator()(const Shrink& p, int64_t product, int64_t t0, int c0,
                                             int columns, A (&total)[kTiles][4],
                                             char* shared) const {
    const int r = p.rows.R, ld = static_cast<int>(padded(r)), pitch = odd(columns);
    const int n = static_cast<int>(min(p.T - t0, int64_t{blockDim.x / 2}));
    const A* tile = share_sums(total, columns, pitch, shared);
    for_each(n, min(ld - c0, 8 * kTiles), [&](int row, int c) {
      const int64_t token = product * p.T + t0 + row, at = token * ld + c0 + c;
      const bool exists = c < columns;
      A sum = exists ? tile[row * pitch + c] : A(0);
      A* hidden = static_cast<A*>(to.hidden) + token * r + c0 + c;
      if (to.dhidden) {
        static_cast<T*>(to.dhidden)[at] = static_cast<T>(sum);
        if (exists) sum = *hidden;
      } else if (exists) {
        *hidden = sum;
      }
      if (to.low) static_cast<T*>(to.low)[at] = static_cast<T>(sum);
    });
  }
};

// The gradients of the merged factor, of row 0 on.
template <class A>
struct Gradients {
  const A* of_rows;
  int64_t distance;  // from one part to the next
  int parts;

  __device__ Gradients(const Unmerge& p, bool up)
      : of_rows(static_cast<const A*>(p.gradients) +
                (up ? 0 : p.factors.rows * p.factors.r * p.factors.up.columns)),
        distance(p.factors.rows * p.factors.r * (p.factors.up.columns + p.factors.down.columns)),
        parts(p.parts) {}
  template <int kWidth>
  __device__ __forceinline__ void operator()(int64_t at, A (&sums)[kWidth]) const {
    load(of_rows + at, sums);
    for (int part = 1; part < parts; ++part) {
      A more[kWidth];
      load(of_rows + part * distance + at, more);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[j] += more[j];
    }
  }
};

// A group of experts' gradients, in a block's share of a factor.
template <class T>
__device__ __forceinline__ void unmerge(const Unmerge& p, bool up, int64_t block, int first) {
  using A = acc_t<T>;
  const Merged& m = p.factors;
  const Merged::Factor& factor = up ? m.up : m.down;
  const int64_t flat = m.r * factor.columns;
  const A scale = up ? static_cast<A>(m.scale) : A(1);
  const Gradients<A> gradients(p, up);
  void* to = up ? p.dup : p.ddown;
  for_chunks<T>(m, factor, to, block, [&](auto width, int64_t f) {
    constexpr int kWidth = decltype(width)::value;
    A sums[kGroup][kWidth] = {};
    const A* weights = weights_at<A>(m, factor, 0, f);
    weigh(
        m.rows, sums,
        [&](int64_t row, A(&gradient)[kWidth]) { gradients(row * flat + f, gradient); },
        [&](int i, int64_t row) {
          return first + i < m.E ? weights[row * m.splits * m.E + first + i] : A(0);
        });
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (first + i < m.E) store(static_cast<T*>(to) + (first + i) * flat + f, sums[i], scale);
  });
}

// This thread's share of <merged gradient, expert's factor> for a weight.
template <class T>
__device__ __forceinline__ acc_t<T> product_of(const Unmerge& p, bool up, int64_t row, int split,
                                               int e) {
  using A = acc_t<T>;
  const Merged::Factor& factor = up ? p.factors.up : p.factors.down;
  const int64_t flat = p.factors.r * factor.columns, segment = factor.columns / p.factors.splits;
  const T* expert = static_cast<const T*>(factor.experts) + e * flat;
  const Gradients<A> gradients(p, up);
  A sum = 0;
  for (int64_t i = threadIdx.x; i < p.factors.r * segment; i += kThreads) {
    const int64_t f = i / segment * factor.columns + split * segment + i % segment;
    A gradient[1];
    gradients(row * flat + f, gradient);
    sum += gradient[0] * static_cast<A>(expert[f]);
  }
  return sum;
}

// Grid: the chunks of both factors x groups of experts, if wanted; then the weights, a block each.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) unmerge_kernel(const Unmerge p, int64_t blocks) {
  extern __shared__ __align__(16) char shared[];
  using A = acc_t<T>;
  const Merged& m = p.factors;
  if (blockIdx.x < blocks) {
    const int64_t before = blocks_of<T>(m, m.down), all = before + blocks_of<T>(m, m.up);
    const int64_t block = blockIdx.x % all;
    const bool up = block >= before;
    return unmerge<T>(p, up, up ? block - before : block,
                      static_cast<int>(blockIdx.x / all) * kGroup);
  }
  A* sums = reinterpret_cast<A*>(shared);
  const int64_t weight = blockIdx.x - blocks, row = weight / (m.splits * m.E);
  const int split = static_cast<int>(weight / m.E % m.splits), e = static_cast<int>(weight % m.E);
  sums[threadIdx.x] = product_of<T>(p, false, row, split, e) +
                      static_cast<A>(m.scale) * product_of<T>(p, true, row, split, e);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) static_cast<A*>(p.dweights)[weight] = sums[0];
}

}  // namespace

void launch_merge(DType dtype, const Merged& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t blocks =
        (blocks_of<T>(p, p.down) + blocks_of<T>(p, p.up)) * ceil_div<int64_t>(p.rows, kGroup);
    launch("merge", merge_kernel<T>, dim3(static_cast<unsigned>(blocks)), kThreads, 0, stream, p);
  });
}

void launch_merged_shrink(DType dtype, const Shrink& p, const ShrinkPlan& plan,
                          const MergedHidden& to, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ShrinkTile<T>;
    launch("shrink", shrink_kernel<T, false, WriteHidden<T>>,
           shrink_grid(p, plan, ceil_div(p.rows.count(), S::kColumns)), 32 * plan.warps,
           S::shared_bytes(plan.warps, p.rows.count()), stream, p, {to});
  });
}

ShrinkPlan plan_merged(DType dtype, const Merged& factors, const Shrink& p, const Expand& expand,
                       Device device) {
  ShrinkPlan plan = plan_shrink(dtype, p, device);
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const int64_t of_column = factors.E * factors.r * int64_t{sizeof(T)};
    const int64_t span = plan.parts == 1 ? p.columns : segment_length(p.columns);
    plan.few = kExpands<T> && factors.rows * p.T <= kFewTokens &&
               factors.rows * of_column * (p.columns + expand.columns) <= kBytesOfLaunch &&
               of_column * std::max<int64_t>(span, ExpandTile<T>::kColumns) <= kBlockBytesOfLaunch;
    // Threads to merge, or no parts, which would take another launch to be added.
    if (plan.few)
      plan.warps = ShrinkTile<T>::kMostWarps;
    else
      plan.parts = 1;
  });
  plan.copies = plan.few ? expand_strips(dtype, expand) : 1;
  return plan;
}

void launch_merged(DType dtype, const Merged& factors, Shrink shrink, const MergedHidden& to,
                   const ShrinkPlan& plan, Expand expand, void* stream) {
  shrink.rows.experts = factors.down.merged;
  expand.rows.experts = factors.up.merged;
  expand.h = to.low;
  if (!plan.few) {
    launch_merge(dtype, factors, stream);
    launch_merged_shrink(dtype, shrink, plan, to, stream);
    return launch_expand(dtype, expand, stream);
  }
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = ShrinkTile<T>;
    if constexpr (kExpands<T>) {
      launch("shrink", shrink_kernel<T, false, MergeRows<T>>,
             shrink_grid(shrink, plan, ceil_div(shrink.rows.count(), S::kColumns)), 32 * plan.warps,
             S::shared_bytes(plan.warps, shrink.rows.count()), stream, shrink,
             MergeRows<T>(factors));
      const int strips = static_cast<int>(plan.copies);
      launch(
          "expand", merge_and_expand_kernel<T>, dim3(static_cast<unsigned>(strips * factors.rows)),
          32 * ExpandTile<T>::kWarps, ExpandTile<T>(expand.rows).shared_bytes(), stream,
          static_cast<const acc_t<T>*>(shrink.partials), plan.parts, factors, to, expand, strips);
    }
  });
}

void launch_unmerge(DType dtype, const Unmerge& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const Merged& m = p.factors;
    const int64_t blocks =
        p.dup ? (blocks_of<T>(m, m.down) + blocks_of<T>(m, m.up)) * ceil_div<int64_t>(m.E, kGroup)
              : 0;
    const int64_t weights = p.dweights ? m.rows * m.splits * m.E : 0;
    launch("unmerge", unmerge_kernel<T>, dim3(static_cast<unsigned>(blocks + weights)), kThreads,
           kThreads * sizeof(acc_t<T>), stream, p, blocks);
  });
}

}  // namespace moelora::cuda
