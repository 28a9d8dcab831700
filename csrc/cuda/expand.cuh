// Expand: y[t] = (bias or y[t]) + mask ⊙ Σ_c h[t, c] row_c.  A block keeps its strips of the rows
// in shared memory and walks tokens; a warp owns 16 of them at a time, for one strip after the
// other.
#pragma once

#include "cuda/product.cuh"

namespace moelora::cuda {

constexpr int kExpandBlocks = 2;  // per multiprocessor

template <class T>
struct ExpandTile {
  using A = acc_t<T>;
  static constexpr int kTiles = sizeof(A) == 8 ? 4 : 16;  // of 8 columns
  static constexpr int kColumns = 8 * kTiles;             // of a strip
  static constexpr int kRows = 128;  // of a strip at a time; with more, it is loaded per tile
  static constexpr int kWarps = 4;   // unless a launch chooses otherwise
  static constexpr int kTokens = 16 * kWarps;
  static constexpr int kMostWarps = 8, kMostStrips = 4;
  static constexpr int kPitch = kColumns + kChunk<T>;
  static constexpr int kStagePitch = kColumns + 8;  // elements of A: rows of a sum in other banks

  int width;  // coefficients of a token
  int rows;   // in shared memory at a time
  int warps, strips;
  __host__ __device__ explicit ExpandTile(const Rows& r, int warps = kWarps, int strips = 1)
      : width(static_cast<int>(padded(r.count()))),
        rows(width < kRows ? width : kRows),
        warps(warps),
        strips(strips) {}
  __host__ __device__ bool resident() const { return width <= kRows; }
  // Of a strip's rows and the coefficients: where a multiprocessor has one block, what comes next
  // travels while this is multiplied.
  __host__ __device__ int buffers() const { return !resident() && warps == kMostWarps ? 2 : 1; }
  __host__ __device__ int tokens() const { return 16 * warps; }
  __host__ __device__ int h_pitch() const { return rows + kChunk<T>; }
  __host__ __device__ int strip_size() const { return rows * kPitch; }
  __host__ __device__ int h_size() const { return tokens() * h_pitch(); }
  __host__ __device__ int buffer_size() const { return strips * strip_size() + h_size(); }
  int64_t shared_bytes() const {
    return buffers() * buffer_size() * sizeof(T) + tokens() * kStagePitch * sizeof(A);
  }
};

// sums [16, kColumns] += h rows, for coefficients [begin, end).
//   h [16, end], pitch; strip [end, kColumns], kPitch; rows that end in the same step are finite
template <class T>
__device__ __forceinline__ void expand_rows(acc_t<T> (&sums)[ExpandTile<T>::kTiles][4], const T* h,
                                            int pitch, const T* strip, int begin, int end,
                                            bool filter) {
  using P = Product<T>;
  constexpr int kPitch = ExpandTile<T>::kPitch;
  for (int c = begin / P::kDepth * P::kDepth; c < end; c += P::kDepth) {
    typename P::A a;
    P::load_a(a, h + c, pitch);
    if (filter) P::filter(a, [&](int, int i) { return begin <= c + i && c + i < end; });
#pragma unroll
    for (int j = 0; j < ExpandTile<T>::kTiles; j += 2) {
      typename P::B b[2];
      P::load_b_transposed(b, strip + c * kPitch + 8 * j, kPitch);
      P::add(sums[j], a, b[0]);
      P::add(sums[j + 1], a, b[1]);
    }
  }
}

// total += mask ⊙ sums; sums = 0.
template <class T, class Tokens>
__device__ __forceinline__ void add_masked(acc_t<T> (&total)[ExpandTile<T>::kTiles][4],
                                           acc_t<T> (&sums)[ExpandTile<T>::kTiles][4],
                                           const Dropout& dropout, const MaskGroup& group,
                                           const Tokens& tokens, int64_t t0, int64_t column) {
#pragma unroll
  for (int j = 0; j < ExpandTile<T>::kTiles; j += 2) {
    acc_t<T>(&pair)[2][4] = reinterpret_cast<acc_t<T>(&)[2][4]>(sums[j]);
    if (group.masked) {
      const KeepTile keep(dropout, tokens, t0, column + 8 * j, group.expert);
      for_each_sum(pair, [&](int row, int c, acc_t<T>& sum) {
        if (!keep(row, c)) sum = 0;
      });
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      total[j + i / 4][i % 4] += pair[i / 4][i % 4];
      pair[i / 4][i % 4] = 0;
    }
  }
}

// One warp's 16 tokens of y, through shared memory so that accesses are wide.
//   stage [16, kStagePitch] of this warp
template <class T, class Tokens>
__device__ __forceinline__ void write_tokens(const Expand& p, const Tokens& tokens, int64_t t0,
                                             int64_t n0, acc_t<T> (&sums)[ExpandTile<T>::kTiles][4],
                                             acc_t<T>* stage) {
  using S = ExpandTile<T>;
  constexpr int kPerRow = S::kColumns / kChunk<T>;
  T* y = static_cast<T*>(p.y);
  const T* bias = static_cast<const T*>(p.bias);
  const bool aligned = aligned16(y, p.ldy) && aligned16(bias);
  for_each_sum(sums, [&](int row, int c, acc_t<T> sum) { stage[row * S::kStagePitch + c] = sum; });
  __syncwarp();
  for (int i = lane_id(); i < 16 * kPerRow; i += 32) {
    const int row = i / kPerRow, c = i % kPerRow * kChunk<T>;
    const int64_t n = n0 + c, left = p.columns - n;
    if (t0 + row >= tokens.end || left <= 0) continue;
    T* to = y + tokens(t0 + row) * p.ldy + n;
    const T* start = p.accumulate ? to : bias ? bias + n : nullptr;
    const auto value = [&](int j, T before) {
      const acc_t<T> sum = stage[row * S::kStagePitch + c + j];
      return static_cast<T>(start ? sum + static_cast<acc_t<T>>(before) : sum);
    };
    if (aligned && left >= kChunk<T>) {
      Chunk<T> chunk = {};
      if (start) chunk = load_global(start);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) chunk.v[j] = value(j, chunk.v[j]);
      store_global(to, chunk);
    } else {
      for (int j = 0; j < kChunk<T> && j < left; ++j) to[j] = value(j, start ? start[j] : T(0.0f));
    }
  }
  __syncwarp();
}

// Sums over blocks, a thread a column: in double, as long inputs have hundreds of them, and four at
// a time, so that four loads are in flight.
template <class A>
__device__ __forceinline__ void add_statistics(const Statistics& s) {
  constexpr int kSums = 4;
  for (int e = threadIdx.x; e < s.E; e += blockDim.x) {
    double sums[kSums] = {};
    int64_t count = 0;
    for (int64_t b0 = 0; b0 < s.blocks; b0 += kSums)
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        if (b0 + i >= s.blocks) continue;
        sums[i] += static_cast<const A*>(s.prob_partials)[(b0 + i) * s.E + e];
        if (s.counts) count += s.count_partials[(b0 + i) * s.E + e];
      }
    static_cast<A*>(s.prob_sums)[e] = static_cast<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (s.counts) s.counts[e] = count;
  }
}

// Strips of columns, from n0 on, of the tokens of tiles [first, last).
//   strips  more than one only if all rows stay in the block
//   shared  ExpandTile::shared_bytes
template <class T, bool kMasked, class Tokens>
__device__ __forceinline__ void expand_walk(const Expand& p, const Tokens& tokens, int64_t n0,
                                            int64_t first, int64_t last, char* shared,
                                            int strips = 1) {
  using S = ExpandTile<T>;
  using A = acc_t<T>;
  const S shape(p.rows, blockDim.x / 32, strips);
  T* memory = reinterpret_cast<T*>(shared);
  A* stage = reinterpret_cast<A*>(memory + shape.buffers() * shape.buffer_size()) +
             warp_id() * 16 * S::kStagePitch;
  const RowAddress<T> address(p.rows, p.columns);
  const bool rows_aligned = address.aligned(), resident = shape.resident();
  const int count = p.rows.count();
  Dropout dropout = {};
  if (kMasked) dropout = load_dropout(p.masks);

  const auto strips_of = [&](int step) {
    return memory + step % shape.buffers() * shape.buffer_size();
  };
  const auto h_of = [&](int step) {
    return strips_of(step) + strips * shape.strip_size() + warp_id() * 16 * shape.h_pitch();
  };
  const auto first_of = [&](int64_t tile) { return tile * shape.tokens() + warp_id() * 16; };
  const auto copy_h = [&](int64_t tile, int c0, int step) {
    const T* from = static_cast<const T*>(p.h);
    const int64_t t0 = first_of(tile);
    copy_rows(h_of(step), shape.h_pitch(), 16, min(shape.width - c0, S::kRows), c0, shape.width,
              true, lane_id(), 32,
              [&](int i) { return t0 + i < tokens.end ? from + tokens(t0 + i) * p.ldh : nullptr; });
  };
  const auto copy = [&](int64_t tile, int c0, int step) {
    for (int i = 0; i < strips; ++i)
      copy_rows(strips_of(step) + i * shape.strip_size(), S::kPitch,
                min(shape.width - c0, S::kRows), S::kColumns, n0 + i * S::kColumns, p.columns,
                rows_aligned, threadIdx.x, blockDim.x,
                [&](int row) { return c0 + row < count ? address(c0 + row) : nullptr; });
    copy_h(tile, c0, step);
  };

  int step = 0;
  for (int64_t tile = first; tile < last; ++tile)
    for (int i = 0; i < strips; ++i) {
      const int64_t t0 = first_of(tile), n = n0 + i * S::kColumns;
      A sums[S::kTiles][4] = {}, total[S::kTiles][4] = {};
      for (int c0 = 0; c0 < shape.width; c0 += S::kRows, ++step) {
        const int rows = min(shape.width - c0, S::kRows);
        const bool shared_is_new = !resident || step == 0;
        if (step == 0 || (shared_is_new && shape.buffers() == 1)) {
          __syncthreads();
          copy(tile, c0, step);
        }
        ptx::copy_async_commit();
        ptx::copy_async_wait<0>();
        if (shared_is_new)
          __syncthreads();
        else
          __syncwarp();
        if (shape.buffers() == 2) {
          if (c0 + S::kRows < shape.width)
            copy(tile, c0 + S::kRows, step + 1);
          else if (tile + 1 < last)
            copy(tile + 1, 0, step + 1);
        }
        const T *own = strips_of(step) + i * shape.strip_size(), *h = h_of(step);
        if (!kMasked) {
          expand_rows<T>(sums, h, shape.h_pitch(), own, 0, rows, false);
        } else {
          for (int g = 0; g < mask_groups(p.rows, p.masks); ++g) {
            const MaskGroup group = mask_group(p.rows, p.masks, g);
            const int begin = max(group.begin - c0, 0), end = min(group.end - c0, rows);
            if (begin >= end) continue;
            expand_rows<T>(sums, h, shape.h_pitch(), own, begin, end, true);
            add_masked<T>(total, sums, dropout, group, tokens, t0, n);
          }
        }
      }
      // The next tile's coefficients travel while this one's last sums are written.
      __syncwarp();
      if (resident && i + 1 == strips && tile + 1 < last) copy_h(tile + 1, 0, step);
      write_tokens<T>(p, tokens, t0, n, kMasked ? total : sums, stage);
    }
}

// What one block does.
//   block   of strips x walks of all products; behind them, the one for the statistics
//   across  blocks side by side
//   shared  ExpandTile::shared_bytes
template <class T, bool kMasked>
__device__ __forceinline__ void expand_block(Expand p, int64_t block, int across,
                                             const ExpandPlan& plan, char* shared) {
  using S = ExpandTile<T>;
  const int64_t tiles = ceil_div<int64_t>(p.T, 16 * plan.warps);
  const int64_t walk = block / across, walks = ceil_div(tiles, plan.tiles_per_walk);
  const int64_t product = walk / walks, first = walk % walks * plan.tiles_per_walk;
  const int64_t last = min(tiles, first + plan.tiles_per_walk);
  if (product == p.batch.count) return add_statistics<acc_t<T>>(p.statistics);
  advance<T>(p.h, product * p.batch.coefficients);
  advance<T>(p.rows.experts, product * p.batch.rows);
  advance<T>(p.bias, product * p.batch.bias);
  advance<T>(p.y, product * p.batch.vectors);
  expand_walk<T, kMasked>(p, AllTokens{p.T}, block % across * plan.strips * S::kColumns, first,
                          last, shared, plan.strips);
}

}  // namespace moelora::cuda
