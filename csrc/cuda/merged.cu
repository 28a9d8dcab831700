// Averaged factors, merged for each row of a table of weights, so that a token meets r rows instead
// of E r: the merging, the shrink with it, and its gradients.  A factor is taken as flat, r times
// its columns numbers for each expert.
#include "cuda/shrink.cuh"

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

// f(std::integral_constant<int, width>, i): a block's share of a factor, `width` numbers from i on,
// which have the same weight.
template <class T, class F>
__device__ __forceinline__ void for_chunks(const Merged& p, const Merged::Factor& factor,
                                           const void* other, int64_t block, const F& f) {
  const int64_t flat = p.r * factor.columns, first = block * kThreads * kChunk<T>;
  const bool wide = factor.columns / p.splits % kChunk<T> == 0 &&
                    aligned16(static_cast<const T*>(factor.experts)) &&
                    aligned16(static_cast<const T*>(other));
  if (wide) {
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

// sums [kGroup, kWidth] over all `count` of weight(i, k) values(k).
//   load_values(k, values)
template <int kWidth, class A, class Load, class Weight>
__device__ __forceinline__ void weigh(int64_t count, A (&sums)[kGroup][kWidth],
                                      const Load& load_values, const Weight& weight) {
  for (int64_t k = 0; k < count; ++k) {
    A values[kWidth];
    load_values(k, values);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const A w = weight(i, k);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sums[i][j] += w * values[j];
    }
  }
}

// Grid: the chunks of both factors x groups of the table's rows.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) merge_kernel(const Merged p) {
  using A = acc_t<T>;
  const int64_t before = blocks_of<T>(p, p.down), all = before + blocks_of<T>(p, p.up);
  const int64_t block = blockIdx.x % all, first = blockIdx.x / all * kGroup;
  const bool up = block >= before;
  const Merged::Factor& factor = up ? p.up : p.down;
  const int64_t flat = p.r * factor.columns;
  const A scale = up ? static_cast<A>(p.scale) : A(1);
  for_chunks<T>(p, factor, factor.merged, up ? block - before : block, [&](auto width, int64_t f) {
    constexpr int kWidth = decltype(width)::value;
    A sums[kGroup][kWidth] = {};
    const A* weights = weights_at<A>(p, factor, first, f);
    weigh(
        p.E, sums,
        [&](int64_t e, A(&row)[kWidth]) {
          load(static_cast<const T*>(factor.experts) + e * flat + f, row);
        },
        [&](int i, int64_t e) {
          return first + i < p.rows ? weights[i * p.splits * p.E + e] : A(0);
        });
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      if (first + i < p.rows)
        store(static_cast<T*>(factor.merged) + (first + i) * flat + f, sums[i], scale);
  });
}

// What shrinks with merged factors leave behind.
template <class T>
struct WriteHidden {
  using A = acc_t<T>;
  MergedHidden to;

  template <int kTiles>
  __device__ __forceinline__ void operator()(const Shrink& p, int64_t product, int64_t t0, int c0,
                                             int columns, A (&total)[kTiles][4], char*) const {
    const int r = p.rows.R, ld = static_cast<int>(padded(r)), own = warp_id() * 16;
    for_each_sum(total, [&](int row, int c, A sum) {
      const int64_t t = t0 + own + row, token = product * p.T + t;
      if (t >= p.T || c0 + c >= ld) return;
      const int64_t at = token * ld + c0 + c;
      const bool exists = c < columns;
      A* hidden = static_cast<A*>(to.hidden) + token * r + c0 + c;
      if (to.dhidden) {
        static_cast<T*>(to.dhidden)[at] = static_cast<T>(exists ? sum : A(0));
        sum = exists ? *hidden : A(0);
      } else if (exists) {
        *hidden = sum;
      }
      if (to.low) static_cast<T*>(to.low)[at] = static_cast<T>(exists ? sum : A(0));
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
