// The shrink on the tensor-core instructions of compute capability 9.0 (wgmma), for more rows than
// one tile of shrink.cuh has columns: there mma.sync, which every warp feeds from registers, takes
// longer than reading v.  16-bit types without dropout.
#pragma once

#include "cuda/shrink.cuh"

namespace moelora::cuda {

// Two warp groups share the rows; each owns 64 tokens.  With a segment's sums and the totals, 192
// columns are what its registers hold.
struct WgmmaTile {
  static constexpr int kTiles = 24;  // of 8 columns
  static constexpr int kColumns = 8 * kTiles;
  static constexpr int kTokens = 128;
  static constexpr int kThreads = 256;
  static constexpr int kFeatures = 64;  // a step: one line of every row, as wide as a swizzle goes
  static constexpr int kStages = 4;
  static constexpr int kAhead = kStages - 2;  // of copies: one more stage is still being read
  static_assert(kSegmentUnit % kFeatures == 0);

  static __host__ __device__ int column_tiles(int rows) { return ceil_div(rows, kColumns); }
  // Of each tile but the last, so that all have about as much to read.
  static __host__ __device__ int columns(int rows) {
    return 8 * ceil_div(ceil_div(rows, column_tiles(rows)), 8);
  }
  template <class T>
  static constexpr int kStage = (kTokens + kColumns) * kFeatures * sizeof(T);  // bytes
};

// A matrix's rows on their way into tiles as ptx::wgmma_operand has them: [kRows, kFeatures], of
// which eight threads share a row.  Addresses are computed once, as there is little time for that
// between the products.
template <class T, int kRows>
class SwizzledRows {
 public:
  //   rows    how many there are
  //   row(i)  address of column 0 of row i
  template <class Row>
  __device__ __forceinline__ SwizzledRows(int rows, bool aligned, const Row& row)
      : aligned_(aligned) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int i = first_row() + j * kDistance;
      from_[j] = i < rows ? row(i) + chunk() * kChunk<T> : nullptr;
    }
  }
  // Columns from k on; zeros from `columns` on.
  __device__ __forceinline__ void copy(T* tile, int64_t k, int64_t columns) const {
    const int64_t left = columns - k - chunk() * kChunk<T>;
    const int valid = left < 0 ? 0 : left < kChunk<T> ? static_cast<int>(left) : kChunk<T>;
    if (aligned_ && valid == kChunk<T>) {  // nearly always, and a few instructions each
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (from_[j]) ptx::copy_async16(tile + place(j), from_[j] + k, 16);
    } else {
#pragma unroll
      for (int j = 0; j < kOwn; ++j)
        if (from_[j]) copy_chunk(tile + place(j), from_[j] + k, valid, aligned_);
    }
  }
  // The rows that there are not.
  __device__ __forceinline__ void clear(T* tile) const {
#pragma unroll
    for (int j = 0; j < kOwn; ++j)
      if (!from_[j]) store_shared(tile + place(j), Chunk<T>{});
  }

 private:
  static constexpr int kDistance = WgmmaTile::kThreads / 8, kOwn = kRows / kDistance;
  static __device__ __forceinline__ int first_row() { return threadIdx.x / 8; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % 8; }
  static __device__ __forceinline__ int place(int j) {
    static_assert(kDistance % 8 == 0);  // of whole swizzles
    return (first_row() + j * kDistance) * WgmmaTile::kFeatures +
           (chunk() ^ first_row() % 8) * kChunk<T>;
  }

  const T* from_[kOwn];
  bool aligned_;
};

// total [16, columns] of each warp: as shrink_tile.
//   stages kStages x kStage<T>, at a multiple of 1024 bytes
template <class T>
__device__ __forceinline__ void wgmma_shrink_tile(const Shrink& p, int64_t t0, int c0, int columns,
                                                  int64_t k0, int64_t k1, T* stages,
                                                  float (&total)[WgmmaTile::kTiles][4]) {
  using S = WgmmaTile;
  constexpr int kStage = S::kStage<T> / sizeof(T), kRows = S::kTokens * S::kFeatures;
  const T* v = static_cast<const T*>(p.v) + t0 * p.ldv;
  const RowAddress<T> address(p.rows, p.columns);
  const SwizzledRows<T, S::kTokens> tokens(static_cast<int>(min(p.T - t0, int64_t{S::kTokens})),
                                           aligned16(v, p.ldv),
                                           [&](int i) { return v + i * p.ldv; });
  const SwizzledRows<T, S::kColumns> rows(columns, address.aligned(),
                                          [&](int i) { return address(c0 + i); });
  const auto copy = [&](int step) {
    T* to = stages + step % S::kStages * kStage;
    const int64_t k = k0 + int64_t{step} * S::kFeatures;
    tokens.copy(to, k, k1);
    rows.copy(to + kRows, k, k1);
  };
  for (int i = 0; i < S::kStages; ++i) {
    tokens.clear(stages + i * kStage);
    rows.clear(stages + i * kStage + kRows);
  }

  const bool has_tokens = t0 + warp_id() / 4 * 64 < p.T;  // the second warp group may have none
  float sums[S::kTiles][4] = {};
  const int steps = static_cast<int>(ceil_div<int64_t>(k1 - k0, S::kFeatures));
  const int per_segment = static_cast<int>(segment_length(p.columns) / S::kFeatures);
  for (int step = 0; step < S::kAhead; ++step) {
    if (step < steps) copy(step);
    ptx::copy_async_commit();
  }
  for (int first = 0; first < steps; first += per_segment) {
    const int last = min(steps, first + per_segment);
    for (int step = first; step < last; ++step) {
      ptx::copy_async_wait<S::kAhead - 1>();
      // What threads write to shared memory, by stores or by cp.async, goes through the generic
      // proxy, and wgmma reads it through the async one.  So each thread fences what it has written
      // of this step, which has arrived by now, before the barrier tells the others.  The other way
      // round no fence is wanted: a stage is written again when wgmma_wait has told each warp group
      // that it was read, and a barrier the others.
      ptx::fence_async_proxy();
      __syncthreads();
      const T* tile = stages + step % S::kStages * kStage;
      const T* own = tile + warp_id() / 4 * 64 * S::kFeatures;
      if (has_tokens) {
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < S::kFeatures; k += 16)
          ptx::wgmma(sums, own + k, tile + kRows + k, step > first || k > 0);
        ptx::wgmma_commit();
      }
      // Into the stage of two steps ago, whose products all had waited for before the barrier.
      if (step + S::kAhead < steps) copy(step + S::kAhead);
      ptx::copy_async_commit();
      ptx::wgmma_wait<1>(sums);
    }
    ptx::wgmma_wait<0>(sums);
#pragma unroll
    for (int j = 0; j < S::kTiles; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) total[j][i] += sums[j][i];
  }
}

// Grid: column tiles x token tiles of all products, the former side by side so that they find v in
// L2; parts of the features.
//   finish  as in shrink_kernel
template <class T, class Finish>
__global__ void __launch_bounds__(WgmmaTile::kThreads, 1)
    wgmma_shrink_kernel(Shrink p, const Finish finish) {
  if constexpr (ptx::kHasWgmma) {
    extern __shared__ __align__(1024) char stages[];
    using S = WgmmaTile;
    const int column_tiles = S::column_tiles(p.rows.count()), width = S::columns(p.rows.count());
    const int64_t tiles = ceil_div<int64_t>(p.T, S::kTokens), tile = blockIdx.x / column_tiles;
    const int64_t product = tile / tiles, t0 = tile % tiles * S::kTokens;
    advance<T>(p.v, product * p.batch.vectors);
    advance<T>(p.rows.experts, product * p.batch.rows);
    const int c0 = static_cast<int>(blockIdx.x % column_tiles) * width;
    const int columns = min(p.rows.count() - c0, width);
    const int64_t length = gridDim.z == 1 ? p.columns : segment_length(p.columns);
    const int64_t k0 = blockIdx.z * length, k1 = min(p.columns, k0 + length);
    float total[S::kTiles][4] = {};
    wgmma_shrink_tile(p, t0, c0, columns, k0, k1, reinterpret_cast<T*>(stages), total);
    finish(p, product, t0, c0, columns, total, stages);
  }
}

inline dim3 wgmma_shrink_grid(const Shrink& p, const ShrinkPlan& plan) {
  const int64_t tiles = p.batch.count * ceil_div<int64_t>(p.T, 16 * plan.warps);
  return dim3(static_cast<unsigned>(tiles * WgmmaTile::column_tiles(p.rows.count())), 1,
              plan.parts);
}

}  // namespace moelora::cuda
