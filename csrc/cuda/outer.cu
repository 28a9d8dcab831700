// Outer: rows_c = Σ_t h[t, c] mask ⊙ v_t, and sums of small values, for all gradients in one launch
// over chunks of tokens and, if there are several, one that adds the chunks' sums in order.
#include "cuda/product.cuh"

namespace moelora::cuda {
namespace {

template <class T>
struct OuterTile {
  using A = acc_t<T>;
  // Of 16 coefficients; bounded by registers.
  static constexpr int kRowTiles = sizeof(T) == 8 ? 2 : sizeof(T) == 4 ? 6 : 8;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kTiles = 4;  // of 8 columns, per warp
  static constexpr int kWarps = 4;  // of a strip
  static constexpr int kColumns = 8 * kTiles * kWarps;
  static constexpr int kMostStrips = 2;
  static constexpr int kTokens = 32;  // of a step
  static constexpr int kStages = 3;
  static constexpr int kPitch = kColumns + kChunk<T>;

  int width;  // of h
  int rows;   // of it at a time
  int strips;
  __host__ __device__ OuterTile(const OuterProduct& p, int strips)
      : width(static_cast<int>(padded(p.rows.count()))),
        rows(width < kRows ? width : kRows),
        strips(strips) {}
  __host__ __device__ int h_pitch() const { return rows + kChunk<T>; }
  __host__ __device__ int stage_size() const { return kTokens * (strips * kPitch + h_pitch()); }
  int64_t shared_bytes() const { return int64_t{kStages} * stage_size() * sizeof(T); }

  static __host__ __device__ int64_t across(const OuterProduct& p, int strips) {
    return ceil_div<int64_t>(p.columns, strips * kColumns);
  }
  static __host__ __device__ int64_t blocks(const OuterProduct& p, int strips) {
    return p.batch.count * across(p, strips) * ceil_div(p.rows.count(), kRows);
  }
};

// sums [kRows, 32] of this warp += 16 tokens, for the tile's rows [begin, end).
//   h [16, kRows], pitch; v [16, 32] of the warp's columns, kPitch
//   keep (token, feature) for each 16 of the columns
template <class T, class Keep>
__device__ __forceinline__ void outer_16(
    acc_t<T> (&sums)[OuterTile<T>::kRowTiles][OuterTile<T>::kTiles][4], const T* h, int pitch,
    const T* v, int begin, int end, const Keep* keep) {
  using P = Product<T>;
  using S = OuterTile<T>;
#pragma unroll
  for (int t = 0; t < 16; t += P::kDepth) {
    typename P::B b[S::kTiles / 2][2];
#pragma unroll
    for (int j = 0; j < S::kTiles / 2; ++j) {
      P::load_b_transposed(b[j], v + t * S::kPitch + 16 * j, S::kPitch);
      if (!keep) continue;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        P::filter(b[j][i], [&](int token, int c) { return keep[j](t + token, 8 * i + c); });
    }
#pragma unroll
    for (int m = 0; m < S::kRowTiles; ++m) {
      const int row = 16 * m;
      if (row >= end || row + 16 <= begin) continue;
      typename P::A a;
      P::load_a_transposed(a, h + t * pitch + row, pitch);
      if (row < begin || row + 16 > end)
        P::filter(a, [&](int i, int) { return begin <= row + i && row + i < end; });
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) P::add(sums[m][j], a, b[j / 2][j % 2]);
    }
  }
}

// A row of sums, in the accumulator's type or that of the elements.
template <class T>
struct SumRow {
  void* to;
  bool wide;

  __device__ void write(int64_t column, acc_t<T> sum) const {
    if (wide)
      static_cast<acc_t<T>*>(to)[column] = sum;
    else
      static_cast<T*>(to)[column] = static_cast<T>(sum);
  }
};

// In the outputs; `at` counts through the products and the sums, one after the other.
template <class T>
__device__ __forceinline__ SumRow<T> output_row(const Outer& p, int64_t at) {
  const Outer::Output* out = p.outputs;
  for (; at >= out->size; ++out) at -= out->size;
  return {static_cast<char*>(out->to) + at * (out->wide ? sizeof(acc_t<T>) : sizeof(T)), out->wide};
}

// In the partial sums of the block's chunk, if there are any.
template <class T>
__device__ __forceinline__ SumRow<T> part_row(const Outer& p, int64_t at) {
  if (!p.partials) return output_row<T>(p, at);
  return {static_cast<acc_t<T>*>(p.partials) + blockIdx.y * p.size() + at, true};
}

// A strip of columns of one row's sums: threads stand side by side along a token's columns, as many
// tokens at a time as there is room for.
constexpr int kSumColumns = 32;

__host__ __device__ inline int64_t sum_blocks(const TokenSums& s) {
  return s.rows * ceil_div(s.columns, kSumColumns);
}

//   V       type of the values
//   shared  [blockDim.x]
//   write   (element of [rows, columns], sum)
template <class V, class A, class Write>
__device__ __forceinline__ void sum_tokens(const TokenSums& s, int64_t block, int64_t t_begin,
                                           int64_t t_end, A* shared, const Write& write) {
  const int strips = ceil_div(s.columns, kSumColumns);
  const int64_t row = block / strips;
  const int c0 = static_cast<int>(block % strips) * kSumColumns;
  const int columns = min(s.columns - c0, kSumColumns);
  int width = 1;
  while (width < columns) width *= 2;
  const int column = threadIdx.x % width, lane = threadIdx.x / width;
  const int lanes = blockDim.x / width;
  if (!s.row.map) {
    t_begin = max(t_begin, row * s.row.tokens_per_row);
    t_end = min(t_end, (row + 1) * s.row.tokens_per_row);
  }
  const V* values = static_cast<const V*>(s.values) + c0 + column;
  A sum = 0;
  if (column < columns)
    for (int64_t t = t_begin + lane; t < t_end; t += lanes)
      if (!s.row.map || s.row.map[t] == row) sum += static_cast<A>(values[t * s.ld]);
  shared[threadIdx.x] = sum;
  for (int half = lanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half * width];
  }
  if (lane == 0 && column < columns)
    write(row * s.columns + c0 + column, static_cast<A>(s.scale) * shared[column]);
}

// Rows of v and of h: all, or those of an expert.
struct AllRows : AllTokens {
  __device__ int64_t pair(int64_t i) const { return i; }
};
struct SegmentRows {
  const int32_t* order;
  int64_t end;
  int k;
  __device__ int32_t pair(int64_t i) const { return i < end ? order[i] : 0; }
  __device__ int64_t operator()(int64_t i) const { return pair(i) / k; }
};

// Grid: the tiles of both products and the strips of both sums x chunks of tokens.
template <class T, bool kMasked, bool kSegments>
__global__ void __launch_bounds__(32 * OuterTile<T>::kWarps * OuterTile<T>::kMostStrips, 1)
    outer_kernel(const Outer p) {
  extern __shared__ __align__(16) char shared[];
  using S = OuterTile<T>;
  using A = acc_t<T>;
  const int64_t first = S::blocks(p.products[0], p.strips);
  const int64_t both = first + S::blocks(p.products[1], p.strips);
  int64_t t_begin = blockIdx.y * p.chunk, t_end = min(p.T, t_begin + p.chunk);
  if (blockIdx.x >= both) {
    const int64_t block = blockIdx.x - both, before = sum_blocks(p.sums[0]);
    const bool other = block >= before;
    const TokenSums& sums = p.sums[other];
    const int64_t at = p.products[0].size() + p.products[1].size() + (other ? p.sums[0].size() : 0);
    // A row of a sum may go to several outputs.
    const auto write = [&](int64_t i, A sum) { part_row<T>(p, at + i).write(0, sum); };
    const int64_t strip = block - (other ? before : 0);
    A* lanes = reinterpret_cast<A*>(shared);
    if (sums.wide)
      sum_tokens<A>(sums, strip, t_begin, t_end, lanes, write);
    else
      sum_tokens<T>(sums, strip, t_begin, t_end, lanes, write);
    return;
  }
  const bool second = blockIdx.x >= first;
  const OuterProduct& product = p.products[second];
  const int64_t across = S::across(product, p.strips), count = product.batch.count;
  const int64_t block = (second ? blockIdx.x - first : blockIdx.x) / count;
  const int64_t one = (second ? blockIdx.x - first : blockIdx.x) % count;
  const int64_t n0 = block % across * p.strips * S::kColumns;
  const int c0 = static_cast<int>(block / across) * S::kRows;
  const int rows = min(product.rows.count() - c0, S::kRows);

  const S shape(product, p.strips);
  T* stages = reinterpret_cast<T*>(shared);
  const T* h = static_cast<const T*>(product.h) + one * product.batch.coefficients;
  const T* v = static_cast<const T*>(product.v) + one * product.batch.vectors;
  const bool v_aligned = aligned16(v, product.ldv);
  std::conditional_t<kSegments, SegmentRows, AllRows> tokens;
  if constexpr (kSegments) {
    const int32_t* starts = p.segments.starts + one * p.segments.k;
    const int64_t end = starts[p.segments.k];
    t_begin += starts[0];
    t_end = min(end, t_begin + p.chunk);
    tokens.order = p.segments.order;
    tokens.k = p.segments.k;
  }
  tokens.end = t_end;
  const auto copy = [&](int step) {
    T* to = stages + step % S::kStages * shape.stage_size();
    const int64_t t0 = t_begin + int64_t{step} * S::kTokens;
    for (int i = 0; i < p.strips; ++i)
      copy_rows(to + i * S::kTokens * S::kPitch, S::kPitch, S::kTokens, S::kColumns,
                n0 + i * S::kColumns, product.columns, v_aligned, threadIdx.x, blockDim.x,
                [&](int t) { return t0 + t < t_end ? v + tokens(t0 + t) * product.ldv : nullptr; });
    copy_rows(to + p.strips * S::kTokens * S::kPitch, shape.h_pitch(), S::kTokens, shape.rows, c0,
              shape.width, true, threadIdx.x, blockDim.x, [&](int t) {
                return t0 + t < t_end ? h + tokens.pair(t0 + t) * product.ldh : nullptr;
              });
  };

  Dropout dropout = {};
  if (kMasked) dropout = load_dropout(product.masks);
  A sums[S::kRowTiles][S::kTiles][4] = {};
  const int steps = static_cast<int>(ceil_div<int64_t>(t_end - t_begin, S::kTokens));
  for (int step = 0; step < S::kStages - 1; ++step) {
    if (step < steps) copy(step);
    ptx::copy_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    ptx::copy_async_wait<S::kStages - 2>();
    __syncthreads();  // this step has arrived for all, and nobody reads the previous one any more
    if (step + S::kStages - 1 < steps) copy(step + S::kStages - 1);
    ptx::copy_async_commit();

    const T* tile = stages + step % S::kStages * shape.stage_size();
    for (int t = 0; t < S::kTokens; t += 16) {
      const T* own = tile + (warp_id() / S::kWarps * S::kTokens + t) * S::kPitch +
                     warp_id() % S::kWarps * 8 * S::kTiles;
      const T* coefficients = tile + p.strips * S::kTokens * S::kPitch + t * shape.h_pitch();
      if (!kMasked) {
        outer_16<T, KeepTile>(sums, coefficients, shape.h_pitch(), own, 0, rows, nullptr);
        continue;
      }
      const int64_t token = t_begin + int64_t{step} * S::kTokens + t;
      const int64_t column = n0 + warp_id() * 8 * S::kTiles;
      for (int i = 0; i < mask_groups(product.rows, product.masks); ++i) {
        MaskGroup group = mask_group(product.rows, product.masks, i);
        if (kSegments && product.masks.per_expert) group.expert = static_cast<uint32_t>(one);
        const int begin = max(group.begin - c0, 0), end = min(group.end - c0, rows);
        if (begin >= end) continue;
        if (group.masked) {
          const KeepTile keep[S::kTiles / 2] = {
              {dropout, tokens, token, column, group.expert},
              {dropout, tokens, token, column + 16, group.expert}};
          outer_16(sums, coefficients, shape.h_pitch(), own, begin, end, keep);
        } else {
          outer_16<T, KeepTile>(sums, coefficients, shape.h_pitch(), own, begin, end, nullptr);
        }
      }
    }
  }

  const int64_t at = (second ? p.products[0].size() : 0) + one * product.batch.rows;
  const int64_t ld = product.rows.ld ? product.rows.ld : product.columns;
  const int64_t column = n0 + warp_id() * 8 * S::kTiles;
#pragma unroll
  for (int m = 0; m < S::kRowTiles; ++m)
    for_each_row_of_sums(sums[m], [&](int i, const auto& each) {
      const int row = 16 * m + i;
      if (row >= rows) return;
      const SumRow<T> out = part_row<T>(p, at + (c0 + row) * ld);
      each([&](int c, A sum) {
        if (column + c < product.columns) out.write(column + c, sum);
      });
    });
}

// Adds the chunks' sums in order and rounds them.
template <class T>
__global__ void __launch_bounds__(kFlatThreads) add_parts_kernel(const Outer p) {
  using A = acc_t<T>;
  const A* partials = static_cast<const A*>(p.partials);
  const int64_t size = p.size();
  for_each_flat(size, [&](int64_t i) {
    A sum = 0;
    for (int part = 0; part < p.parts; ++part) sum += partials[part * size + i];
    output_row<T>(p, i).write(0, sum);
  });
}

}  // namespace

void plan_outer(DType dtype, Device device, Outer& outer) {
  dispatch(dtype, [&](auto type) {
    using S = OuterTile<typename decltype(type)::type>;
    constexpr int kChunkUnit = 2 * S::kTokens;
    const int64_t most = ceil_div<int64_t>(outer.T, kChunkUnit);
    const auto blocks = [&](int strips) {
      return S::blocks(outer.products[0], strips) + S::blocks(outer.products[1], strips);
    };
    // Wide blocks, one for each multiprocessor, read coefficients half as often as two narrow ones.
    const int64_t bytes = std::max(S(outer.products[0], S::kMostStrips).shared_bytes(),
                                   S(outer.products[1], S::kMostStrips).shared_bytes());
    const bool wide =
        bytes <= device.shared_bytes && blocks(S::kMostStrips) * most >= device.multiprocessors;
    outer.strips = wide ? S::kMostStrips : 1;
    const int64_t wanted = S::kMostStrips / outer.strips * device.multiprocessors;
    const int64_t parts =
        std::clamp<int64_t>(wanted / std::max<int64_t>(blocks(outer.strips), 1), 1, most);
    outer.chunk = ceil_div<int64_t>(ceil_div(outer.T, parts), kChunkUnit) * kChunkUnit;
    outer.parts = static_cast<int>(ceil_div(outer.T, outer.chunk));
  });
}

void launch_outer_parts(DType dtype, const Outer& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using S = OuterTile<T>;
    const int threads = 32 * S::kWarps * p.strips;
    const bool masked = p.products[0].masks.seed || p.products[1].masks.seed;
    const int64_t blocks = S::blocks(p.products[0], p.strips) + S::blocks(p.products[1], p.strips) +
                           sum_blocks(p.sums[0]) + sum_blocks(p.sums[1]);
    const int64_t shared = std::max({S(p.products[0], p.strips).shared_bytes(),
                                     S(p.products[1], p.strips).shared_bytes(),
                                     static_cast<int64_t>(threads * sizeof(acc_t<T>))});
    const auto kernel = p.segments.order
                            ? masked ? outer_kernel<T, true, true> : outer_kernel<T, false, true>
                        : masked ? outer_kernel<T, true, false>
                                 : outer_kernel<T, false, false>;
    launch("outer", kernel, dim3(static_cast<unsigned>(blocks), p.parts), threads, shared, stream,
           p);
  });
}

void launch_outer(DType dtype, const Outer& p, void* stream) {
  if (p.size() == 0) return;
  launch_outer_parts(dtype, p, stream);
  if (!p.partials) return;
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("add_parts", add_parts_kernel<T>, flat_grid(p.size()), kFlatThreads, 0, stream, p);
  });
}

}  // namespace moelora::cuda
