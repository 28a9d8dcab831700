// A mix behind a shrink: a functor over rows of sums in shared memory, which runs at the end of the
// product's own kernel (fused), or in a kernel that first adds the product's partial sums.
#pragma once

#include "cuda/shrink.cuh"

namespace moelora::cuda {

// Odd: a thread a row meets no bank conflicts.
__host__ __device__ constexpr int odd(int n) { return n | 1; }

// ---------------------------------------------------------------- what mixes are made of

// f(row, column) for [n, columns]: a warp a row, its lanes along it.  What depends on the column
// alone, such as its expert, is computed once.
template <class F>
__device__ __forceinline__ void for_each(int n, int columns, const F& f) {
  for (int c = lane_id(); c < columns; c += 32)
    for (int row = warp_id(); row < n; row += blockDim.x / 32) f(row, c);
}

// What token t reads in a column.
template <class A>
__device__ __forceinline__ A table_value(const Table& table, int64_t t, int column) {
  const int64_t row = table.row(t);
  if (row < 0 || row >= table.rows) return static_cast<A>(NAN);
  return static_cast<const A*>(table.values)[row * table.columns + column];
}

// ---------------------------------------------------------------- its launches

// In which launches an element type's mixes can be, see ShrinkPlan.
template <class T>
constexpr bool kFusable = sizeof(T) == 2;
template <class T>
constexpr bool kExpands = sizeof(T) < 8;

// A block's sums in a tile [tokens of the block, pitch] where its stages were, which are no
// smaller; for all of its threads to read.
template <int kTiles, class A>
__device__ __forceinline__ A* share_sums(A (&total)[kTiles][4], int columns, int pitch,
                                         char* shared) {
  A* tile = reinterpret_cast<A*>(shared);
  const int own = warp_id() * 16;
  __syncthreads();  // the last stage was read
  for_each_sum(total, [&](int row, int c, A sum) {
    if (c < columns) tile[(own + row) * pitch + c] = sum;
  });
  __syncthreads();
  return tile;
}

// The mix in the product's own kernel.
//   mix(block, t0, n, tile, pitch, scratch): sums of n tokens from t0 on, tile [n, pitch]
template <class A, class Mix>
struct Fused {
  Mix mix;

  template <int kTiles>
  __device__ __forceinline__ void operator()(const Shrink& p, int64_t, int64_t t0, int, int columns,
                                             A (&total)[kTiles][4], char* shared) const {
    const int tokens = blockDim.x / 2, pitch = odd(columns);
    A* tile = share_sums(total, columns, pitch, shared);
    mix(blockIdx.x, t0, static_cast<int>(min(p.T - t0, int64_t{tokens})), tile, pitch,
        tile + tokens * pitch);
  }
};

constexpr int kMixWarps = 4;

// Of a block, so that every multiprocessor has one.
//   row_bytes  what the mix keeps of one token in shared memory
inline int mix_tokens(int64_t T, int64_t row_bytes, Device device) {
  const int64_t most = std::min<int64_t>(device.shared_bytes / row_bytes, 64);
  if (most == 0)
    throw std::runtime_error("experts: " + std::to_string(row_bytes) +
                             " bytes of a token are more than a block's shared memory holds");
  return static_cast<int>(std::clamp<int64_t>(ceil_div<int64_t>(T, device.multiprocessors),
                                              std::min<int64_t>(kMixWarps, most), most));
}

// The mix of n tokens from t0 on, from partial sums [parts, T, columns].
template <class A, class Mix>
__device__ __forceinline__ void mix_parts(const A* partials, int parts, int64_t T, int columns,
                                          const Mix& mix, int64_t block, int64_t t0, int n,
                                          char* shared) {
  A* tile = reinterpret_cast<A*>(shared);
  const int pitch = odd(columns);
  for (int i = threadIdx.x; i < n * columns; i += blockDim.x)
    tile[i / columns * pitch + i % columns] =
        add_parts(partials, parts, T * columns, t0 * columns + i);
  __syncthreads();
  mix(block, t0, n, tile, pitch, tile + n * pitch);
}

// In a kernel of its own.
template <class A, class Mix>
__global__ void __launch_bounds__(32 * kMixWarps, 4)
    mix_kernel(const A* partials, int parts, int64_t T, int columns, int tokens, const Mix mix) {
  extern __shared__ __align__(16) char shared[];
  const int64_t t0 = static_cast<int64_t>(blockIdx.x) * tokens;
  mix_parts(partials, parts, T, columns, mix, blockIdx.x, t0,
            static_cast<int>(min(T - t0, int64_t{tokens})), shared);
}

// Shrink and mix, in the launches of the plan.  Functor<T> has `mix` in it.
template <template <class> class Functor, class Mix>
void launch_behind_shrink(const char* name, DType dtype, const Shrink& p, const Mix& mix,
                          const ShrinkPlan& plan, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = acc_t<T>;
    const size_t mix_bytes = plan.mix_tokens * row_bytes(dtype, mix);
    if constexpr (kFusable<T>)
      if (plan.fused) {
        const size_t tile_bytes = ShrinkTile<T>::shared_bytes(plan.warps, p.rows.count());
        return launch(name, shrink_kernel<T, false, Fused<A, Functor<T>>>, shrink_grid(p, plan, 1),
                      32 * plan.warps, std::max(tile_bytes, mix_bytes), stream, p, {{mix}});
      }
    launch_partials(dtype, p, plan, stream);
    launch(name, mix_kernel<A, Functor<T>>, dim3(static_cast<unsigned>(plan.mix_blocks)),
           32 * kMixWarps, mix_bytes, stream, static_cast<const A*>(p.partials), plan.parts, p.T,
           static_cast<int>(p.columns_of_h()), plan.mix_tokens, {mix});
  });
}

}  // namespace moelora::cuda
