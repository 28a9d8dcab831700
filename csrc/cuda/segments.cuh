// Tiles of segments: tokens that chose an expert, and a functor that lets a product gather them.
#pragma once

#include "cuda/common.cuh"

namespace moelora::cuda {

// The sum of v over the lanes up to this one.
__device__ __forceinline__ int sum_to_lane(int v) {
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_sync(~0u, v, (lane_id() + 32 - distance) % 32);
    if (lane_id() >= distance) v += before;
  }
  return v;
}

// Tokens of a list in shared memory, which is as long as the tile.
struct ListedTokens {
  const int32_t* list;
  int64_t end;
  __device__ int64_t operator()(int64_t i) const { return list[i]; }
};

// One of the tiles of at most `size` pairs that the segments of all experts are cut into.
struct SegmentTile {
  int32_t expert;      // E: there are not so many tiles
  int32_t begin, end;  // in the order of the pairs
  int32_t count;       // how many

  // The tile, sums of warps and the list of tokens.
  static constexpr int kList = 48;
  static __host__ __device__ constexpr int64_t shared_bytes(int size) { return kList + 4 * size; }
  __device__ ListedTokens tokens(const char* shared) const {
    return {reinterpret_cast<const int32_t*>(shared + kList), count};
  }
};

// Finds a tile, and lists its tokens.  Segments are those of `slots` slots from `slot` on.
//   size    a multiple of 4
//   shared  SegmentTile::shared_bytes, of at most eight warps
__device__ __forceinline__ SegmentTile load_tile(const Segments& s, int tile, int size, int slot,
                                                 int slots, char* shared) {
  SegmentTile* const found = reinterpret_cast<SegmentTile*>(shared);
  int* const warps = reinterpret_cast<int*>(shared + sizeof(SegmentTile));
  static_assert(sizeof(SegmentTile) + 8 * sizeof(int) <= SegmentTile::kList);
  // A thread has some experts in a row.
  const int own = ceil_div(s.E, static_cast<int>(blockDim.x)), e0 = threadIdx.x * own;
  const auto segment = [&](int e) {
    const int32_t* starts = s.starts + static_cast<int64_t>(e) * s.k + slot;
    return SegmentTile{e, starts[0], starts[slots], starts[slots] - starts[0]};
  };
  const auto tiles_of = [&](const SegmentTile& all) { return ceil_div(all.count, size); };
  int tiles = 0;
  for (int e = e0; e < min(e0 + own, s.E); ++e) tiles += tiles_of(segment(e));
  int after = sum_to_lane(tiles);
  if (lane_id() == 31) warps[warp_id()] = after;
  __syncthreads();
  for (int warp = 0; warp < warp_id(); ++warp) after += warps[warp];
  if (after - tiles <= tile && tile < after) {
    int left = tile - (after - tiles);  // of this thread's tiles
    SegmentTile t = segment(e0);
    for (; left >= tiles_of(t); t = segment(t.expert + 1)) left -= tiles_of(t);
    t.begin += left * size;
    t.end = min(t.begin + size, t.end);
    t.count = t.end - t.begin;
    *found = t;
  }
  if (threadIdx.x == blockDim.x - 1 && tile >= after) *found = {s.E, 0, 0, 0};
  __syncthreads();
  const SegmentTile t = *found;
  int32_t* list = reinterpret_cast<int32_t*>(shared + SegmentTile::kList);
  for (int i = threadIdx.x; i < size; i += blockDim.x)
    list[i] = t.begin + i < t.end ? s.order[t.begin + i] / s.k : 0;
  __syncthreads();
  return t;
}

// No fewer than there can be, whatever tokens chose.
inline int64_t most_tiles(const Segments& s, int64_t pairs, int size) {
  return pairs / size + std::min<int64_t>(s.E, pairs);
}

}  // namespace moelora::cuda
