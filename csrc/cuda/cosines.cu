// PEMT's cosines: row mathematics as in mix/cosines.h, a warp for a few tokens.
#include "mix/cosines.h"

#include "cuda/common.cuh"

namespace moelora::cuda {
namespace {

constexpr int kCosineWarps = 4;
// Tokens of a warp, which meet what it has read of an expert's matrix, and columns of a lane.
constexpr int kTokens = 4;
constexpr int kColumns = 2;

template <class A>
__device__ __forceinline__ A sum_of_lanes(A v) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    v += __shfl_sync(~0u, v, lane_id() ^ distance);
  return v;
}

// The tokens of a warp, and how it walks them.  Where there are fewer, the last one is done again
// and not written.
template <class T>
struct WarpTokens {
  using A = acc_t<T>;
  int64_t first, last;

  __device__ explicit WarpTokens(int64_t T_)
      : first((static_cast<int64_t>(blockIdx.x) * kCosineWarps + warp_id()) * kTokens),
        last(T_ - 1) {}
  __device__ bool any() const { return first <= last; }
  __device__ int64_t at(int i) const { return min(first + i, last); }
  __device__ bool exists(int i) const { return first + i <= last; }

  // f(column, products [kTokens]) for a lane's columns of an expert: its matrix [r, r] times hidden
  // [T, E, r], which points at the expert's columns of token 0.
  template <class F>
  __device__ void for_products(const A* matrix, const A* hidden, int64_t R, int r,
                               const F& f) const {
    for (int i0 = 0; i0 < r; i0 += 32 * kColumns) {
      A sums[kColumns][kTokens] = {};
      for (int j = 0; j < r; ++j) {
        A h[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) h[t] = hidden[at(t) * R + j];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int i = i0 + 32 * c + lane_id();
          const A m = i < r ? matrix[static_cast<int64_t>(j) * r + i] : A(0);
#pragma unroll
          for (int t = 0; t < kTokens; ++t) sums[c][t] += h[t] * m;
        }
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c)
        if (i0 + 32 * c + lane_id() < r) f(i0 + 32 * c + lane_id(), sums[c]);
    }
  }
};

// f(column, n) for a lane's chunks of a row of N columns, n of which exist.
template <class T, class F>
__device__ __forceinline__ void for_chunks(int64_t N, const F& f) {
  for (int64_t c = lane_id() * kChunk<T>; c < N; c += 32 * kChunk<T>)
    f(c, static_cast<int>(min(N - c, int64_t{kChunk<T>})));
}
template <class T>
__device__ __forceinline__ Chunk<T> load_row(const T* row, int64_t c, int n, bool aligned) {
  if (aligned && n == kChunk<T>) return load_global(row + c);
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) chunk.v[i] = i < n ? row[c + i] : T(0.0f);
  return chunk;
}

template <class T>
__global__ void __launch_bounds__(32 * kCosineWarps) cosines_kernel(const CosinesForward p) {
  using A = acc_t<T>;
  const WarpTokens<T> tokens(p.T);
  if (!tokens.any()) return;
  const int64_t R = static_cast<int64_t>(p.E) * p.r;
  const A *seen = static_cast<const A*>(p.seen), *hidden = static_cast<const A*>(p.hidden);
  A m[kTokens];
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    const T* f = static_cast<const T*>(p.f) + tokens.at(t) * p.ldf;
    const bool aligned = aligned16(f);
    A square = 0;
    for_chunks<T>(p.N, [&](int64_t c, int n) {
      const Chunk<T> v = load_row(f, c, n, aligned);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        const A value = static_cast<A>(v.v[i]);
        square += value * value;
      }
    });
    m[t] = sqrt(sum_of_lanes(square));
    if (tokens.exists(t) && lane_id() == 0) static_cast<A*>(p.f_norm)[tokens.at(t)] = m[t];
  }
  for (int e = 0; e < p.E; ++e) {
    const int64_t column = static_cast<int64_t>(e) * p.r;
    const A* matrix = static_cast<const A*>(p.factors) + column * p.r;
    A squares[kTokens] = {}, products[kTokens] = {};
    tokens.for_products(matrix, hidden + column, R, p.r, [&](int i, const A(&z)[kTokens]) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const int64_t at = tokens.at(t) * R + column + i;
        squares[t] += z[t] * z[t];
        products[t] += seen[at] * hidden[at];
      }
    });
    const A s = static_cast<const A*>(p.scales)[e];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const A norm = fabs(s) * sqrt(sum_of_lanes(squares[t]));
      const A cosine = s * sum_of_lanes(products[t]) * inverse_norms(m[t], norm);
      if (!tokens.exists(t) || lane_id() != 0) continue;
      static_cast<A*>(p.norms)[tokens.at(t) * p.E + e] = norm;
      static_cast<A*>(p.cosines)[tokens.at(t) * p.E + e] = cosine;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(32 * kCosineWarps)
    cosines_backward_kernel(const CosinesBackward p) {
  using A = acc_t<T>;
  const WarpTokens<T> tokens(p.T);
  if (!tokens.any()) return;
  const int64_t R = static_cast<int64_t>(p.E) * p.r;
  const A *seen = static_cast<const A*>(p.seen), *hidden = static_cast<const A*>(p.hidden);
  const A least = static_cast<A>(kSmallestNorm);
  A m[kTokens], along[kTokens] = {};
#pragma unroll
  for (int t = 0; t < kTokens; ++t) m[t] = static_cast<const A*>(p.f_norm)[tokens.at(t)];
  for (int e = 0; e < p.E; ++e) {
    const int64_t column = static_cast<int64_t>(e) * p.r;
    const A* matrix = static_cast<const A*>(p.factors) + column * p.r;
    const A s = static_cast<const A*>(p.scales)[e];
    A each[kTokens], turn[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t at = tokens.at(t) * p.E + e;
      const A norm = static_cast<const A*>(p.norms)[at];
      const A dcosine = static_cast<const A*>(p.dcosines)[at], ratio = s / norm;
      const A product = dcosine * static_cast<const A*>(p.cosines)[at];
      each[t] = dcosine * s * inverse_norms(m[t], norm);
      turn[t] = norm > least ? product * ratio * ratio : A(0);
      along[t] -= product;
    }
    tokens.for_products(matrix, hidden + column, R, p.r, [&](int i, const A(&turned)[kTokens]) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (!tokens.exists(t)) continue;
        const int64_t at = tokens.at(t) * R + column + i;
        static_cast<A*>(p.dseen)[at] = each[t] * hidden[at];
        static_cast<A*>(p.dhidden)[at] = each[t] * seen[at] - turn[t] * turned[t];
      }
    });
  }
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (!tokens.exists(t)) continue;
    const int64_t token = tokens.at(t);
    const A coefficient = m[t] > least ? along[t] / (m[t] * m[t]) : A(0);
    const T* f = static_cast<const T*>(p.f) + token * p.ldf;
    const T* given = p.df_given ? static_cast<const T*>(p.df_given) + token * p.lddf : nullptr;
    T* df = static_cast<T*>(p.df) + token * p.N;
    const bool aligned = aligned16(f) && aligned16(given) && aligned16(df);
    for_chunks<T>(p.N, [&](int64_t c, int n) {
      const Chunk<T> v = load_row(f, c, n, aligned);
      Chunk<T> total;
      if (given) total = load_row(given, c, n, aligned);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        const A start = given ? static_cast<A>(total.v[i]) : A(0);
        total.v[i] = static_cast<T>(start + coefficient * static_cast<A>(v.v[i]));
      }
      if (aligned && n == kChunk<T>) return store_global(df + c, total);
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i)
        if (i < n) df[c + i] = total.v[i];
    });
  }
}

dim3 cosine_grid(int64_t T) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(T, kCosineWarps * kTokens)));
}

}  // namespace

void launch_cosines(DType dtype, const CosinesForward& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("cosines", cosines_kernel<T>, cosine_grid(p.T), 32 * kCosineWarps, 0, stream, p);
  });
}

void launch_cosines_backward(DType dtype, const CosinesBackward& p, void* stream) {
  dispatch(dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch("cosines_backward", cosines_backward_kernel<T>, cosine_grid(p.T), 32 * kCosineWarps, 0,
           stream, p);
  });
}

}  // namespace moelora::cuda
