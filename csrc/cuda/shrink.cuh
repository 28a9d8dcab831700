// Shrink: h[t, c] = <mask(v_t), row_c>.  What becomes of a tile's sums is a functor's business.
#pragma once

#include "cuda/product.cuh"

namespace moelora::cuda {

template <class T>
struct ShrinkTile {
  using A = acc_t<T>;
  static constexpr int kTiles = sizeof(A) == 8 ? 4 : 16;  // of 8 columns; bounded by registers
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kFeatures = 128 / sizeof(T);     // a step: one line of every row
  static constexpr int kPitch = kFeatures + kChunk<T>;  // an odd number of chunks: no conflicts
  static constexpr int kStages = 4;
  static constexpr int kMostWarps = 8;
  static_assert(kSegmentUnit % kFeatures == 0);

  static int64_t shared_bytes(int warps, int columns) {
    const int64_t rows = 16 * warps + padded(std::min(columns, kColumns));
    return rows * kPitch * sizeof(T) * kStages;
  }
};

// sums [16, columns) of this warp += 16 features, for the tile's columns [begin, end).
//   v    [16, 16] of the warp's tokens, rows [columns, 16], ShrinkTile::kPitch
//   keep (token, feature): the features that these columns see
template <class T, class Keep>
__device__ __forceinline__ void shrink_16(acc_t<T> (&sums)[ShrinkTile<T>::kTiles][4], const T* v,
                                          const T* rows, int begin, int end, const Keep* keep) {
  using P = Product<T>;
  constexpr int kPitch = ShrinkTile<T>::kPitch;
#pragma unroll
  for (int k = 0; k < 16; k += P::kDepth) {
    typename P::A a;
    P::load_a(a, v + k, kPitch);
    if (keep) P::filter(a, [&](int token, int i) { return (*keep)(token, k + i); });
#pragma unroll
    for (int j = 0; j < ShrinkTile<T>::kTiles; j += 2) {
      if (8 * j >= end || 8 * j + 16 <= begin) continue;
      typename P::B b[2];
      P::load_b(b, rows + 8 * j * kPitch + k, kPitch);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = 8 * (j + i);
        if (c >= end || c + 8 <= begin) continue;
        if (c < begin || c + 8 > end)
          P::filter(b[i], [&](int, int n) { return begin <= c + n && c + n < end; });
        P::add(sums[j + i], a, b[i]);
      }
    }
  }
}

// total [16, columns] of each warp: columns [c0, c0 + columns) of h for tokens(t0), tokens(t0 + 1),
// ..., summed over features [k0, k1), k0 at the start of a segment.
//   stages ShrinkTile::shared_bytes
template <class T, bool kMasked, class Tokens>
__device__ __forceinline__ void shrink_tile(const Shrink& p, const Tokens& tokens, int64_t t0,
                                            int c0, int columns, int64_t k0, int64_t k1, T* stages,
                                            acc_t<T> (&total)[ShrinkTile<T>::kTiles][4]) {
  using S = ShrinkTile<T>;
  const int size = blockDim.x / 2, rows_read = static_cast<int>(padded(columns));
  const int stage = (size + rows_read) * S::kPitch;
  const T* v = static_cast<const T*>(p.v);
  const RowAddress<T> address(p.rows, p.columns);
  const bool v_aligned = aligned16(v, p.ldv), rows_aligned = address.aligned();
  const auto copy = [&](int step) {
    T* to = stages + step % S::kStages * stage;
    const int64_t k = k0 + int64_t{step} * S::kFeatures;
    copy_rows(to, S::kPitch, size, S::kFeatures, k, k1, v_aligned, threadIdx.x, blockDim.x,
              [&](int i) { return t0 + i < tokens.end ? v + tokens(t0 + i) * p.ldv : nullptr; });
    copy_rows(to + size * S::kPitch, S::kPitch, rows_read, S::kFeatures, k, k1, rows_aligned,
              threadIdx.x, blockDim.x,
              [&](int i) { return i < columns ? address(c0 + i) : nullptr; });
  };

  Dropout dropout = {};
  if (kMasked) dropout = load_dropout(p.masks);
  acc_t<T> sums[S::kTiles][4] = {};
  const int steps = static_cast<int>(ceil_div<int64_t>(k1 - k0, S::kFeatures));
  const int per_segment = static_cast<int>(segment_length(p.columns) / S::kFeatures);
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) copy(step);
    ptx::copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<S::kStages - 2>();
    __syncthreads();  // this step has arrived for all, and nobody reads the previous one any more
    if (step + S::kStages - 1 < steps) copy(step + S::kStages - 1);
    ptx::copy_async_commit();

    const T* tile = stages + step % S::kStages * stage;
    const T* own = tile + warp_id() * 16 * S::kPitch;
    const T* rows = tile + size * S::kPitch;
    for (int k = 0; k < S::kFeatures; k += 16) {
      if (!kMasked) {
        shrink_16<T, KeepTile>(sums, own + k, rows + k, 0, columns, nullptr);
        continue;
      }
      const int64_t feature = k0 + int64_t{step} * S::kFeatures + k;
      for (int i = 0; i < mask_groups(p.rows, p.masks); ++i) {
        const MaskGroup group = mask_group(p.rows, p.masks, i);
        const int begin = max(group.begin - c0, 0), end = min(group.end - c0, columns);
        if (begin >= end) continue;
        if (group.masked) {
          const KeepTile keep(dropout, tokens, t0 + warp_id() * 16, feature, group.expert);
          shrink_16(sums, own + k, rows + k, begin, end, &keep);
        } else {
          shrink_16<T, KeepTile>(sums, own + k, rows + k, begin, end, nullptr);
        }
      }
    }
    if ((step + 1) % per_segment == 0 || step + 1 == steps)
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[j][i] += sums[j][i];
          sums[j][i] = 0;
        }
  }
}

// Grid: token tiles of all products x column tiles x parts of the features.
//   finish(p, product, t0, c0, columns, total, shared) takes the sums
//   finish.make_rows(product, c0, columns, k0, k1), if it is there, makes the rows that are met
template <class T, bool kMasked, class Finish>
__global__ void __launch_bounds__(32 * ShrinkTile<T>::kMostWarps, 1)
    shrink_kernel(Shrink p, const Finish finish) {
  extern __shared__ __align__(16) char shared[];
  using S = ShrinkTile<T>;
  const int64_t tiles = ceil_div<int64_t>(p.T, blockDim.x / 2), product = blockIdx.x / tiles;
  const int64_t t0 = blockIdx.x % tiles * (blockDim.x / 2);
  advance<T>(p.v, product * p.batch.vectors);
  advance<T>(p.rows.experts, product * p.batch.rows);
  const int c0 = blockIdx.y * S::kColumns, columns = min(p.rows.count() - c0, S::kColumns);
  const int64_t length = gridDim.z == 1 ? p.columns : segment_length(p.columns);
  const int64_t k0 = blockIdx.z * length, k1 = min(p.columns, k0 + length);
  if constexpr (requires { finish.make_rows(product, c0, columns, k0, k1); })
    finish.make_rows(product, c0, columns, k0, k1);
  acc_t<T> total[S::kTiles][4] = {};
  shrink_tile<T, kMasked>(p, AllTokens{p.T}, t0, c0, columns, k0, k1, reinterpret_cast<T*>(shared),
                          total);
  finish(p, product, t0, c0, columns, total, shared);
}

template <class A>
struct WritePartials {
  template <int kTiles>
  __device__ __forceinline__ void operator()(const Shrink& p, int64_t product, int64_t t0, int c0,
                                             int columns, A (&total)[kTiles][4], char*) const {
    const int own = warp_id() * 16;
    const int64_t ld = p.columns_of_h();
    A* out =
        static_cast<A*>(p.partials) + (blockIdx.z * p.T + t0) * ld + product * p.rows.count() + c0;
    for_each_sum(total, [&](int row, int c, A sum) {
      if (c < columns && t0 + own + row < p.T) out[(own + row) * ld + c] = sum;
    });
  }
};

// The sum of an element's parts, `size` elements apart: left to right, as a block that owns all
// segments.
template <class A>
__device__ __forceinline__ A add_parts(const A* partials, int parts, int64_t size, int64_t i) {
  A sum = 0;
  for (int part = 0; part < parts; ++part) sum += partials[part * size + i];
  return sum;
}

// Into p.partials.
void launch_partials(DType dtype, const Shrink& p, const ShrinkPlan& plan, void* stream);

inline dim3 shrink_grid(const Shrink& p, const ShrinkPlan& plan, int column_tiles) {
  return dim3(static_cast<unsigned>(p.batch.count * ceil_div<int64_t>(p.T, 16 * plan.warps)),
              column_tiles, plan.parts);
}

// What is worth a launch that is spared, by the model of backends/strategy.py: tokens, and bytes
// that all multiprocessors read beside, and one of them.
constexpr int kFewTokens = 32;
constexpr int64_t kBytesOfLaunch = 16 << 20;
constexpr int64_t kBlockBytesOfLaunch = 256 << 10;

}  // namespace moelora::cuda
