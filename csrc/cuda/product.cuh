// How a warp multiplies: 16 x 8 tiles of sums, kDepth terms at a time, from operands in shared
// memory.  16-bit elements go through the tensor cores; float and double through fused
// multiply-adds with the same tiles, each lane holding the same elements of a sum:
//   sums[0], [1]: row g, columns 2 q and 2 q + 1;  [2], [3]: row g + 8    (lane 4 g + q)
#pragma once

#include "cuda/common.cuh"

namespace moelora::cuda {

// Operands: a [16, kDepth], b [kDepth, 8].  load_a and load_b read rows that are contiguous along
// what is summed over, the transposed ones rows that are contiguous across it; b comes in pairs of
// neighbouring tiles.  filter zeroes elements: keep(row of a or of b, column).
template <class T>
struct Product {  // 16-bit types
  static constexpr int kDepth = 16;
  struct A {
    uint32_t v[4];
  };
  struct B {
    uint32_t v[2];
  };

  static __device__ __forceinline__ void load_a(A& a, const T* tile, int pitch) {
    const int lane = lane_id();
    ptx::load_matrices(a.v, tile + lane % 16 * pitch + lane / 16 * 8);
  }
  static __device__ __forceinline__ void load_a_transposed(A& a, const T* tile, int pitch) {
    const int lane = lane_id();
    ptx::load_matrices_transposed(a.v,
                                  tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
  }
  static __device__ __forceinline__ void load_b(B (&b)[2], const T* tile, int pitch) {
    const int lane = lane_id();
    uint32_t m[4];
    ptx::load_matrices(m, tile + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8);
    b[0] = {{m[0], m[1]}};
    b[1] = {{m[2], m[3]}};
  }
  static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const T* tile, int pitch) {
    const int lane = lane_id();
    uint32_t m[4];
    ptx::load_matrices_transposed(m, tile + lane % 16 * pitch + lane / 16 * 8);
    b[0] = {{m[0], m[1]}};
    b[1] = {{m[2], m[3]}};
  }
  template <class Keep>
  static __device__ __forceinline__ void filter(A& a, const Keep& keep) {
    const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = g + i % 2 * 8, column = 2 * q + i / 2 * 8;
      a.v[i] &= (keep(row, column) ? 0xFFFFu : 0) | (keep(row, column + 1) ? 0xFFFF0000u : 0);
    }
  }
  template <class Keep>
  static __device__ __forceinline__ void filter(B& b, const Keep& keep) {
    const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * q + i * 8;
      b.v[i] &= (keep(row, g) ? 0xFFFFu : 0) | (keep(row + 1, g) ? 0xFFFF0000u : 0);
    }
  }
  static __device__ __forceinline__ void add(float (&sums)[4], const A& a, const B& b) {
    ptx::multiply_add(sums, a.v, b.v, T{});
  }
};

template <class T>
struct WideProduct {  // float and double
  static constexpr int kDepth = kChunk<T>;
  struct A {
    T v[2][kDepth];  // rows g, g + 8
  };
  struct B {
    T v[2][kDepth];  // columns 2 q, 2 q + 1
  };

  static __device__ __forceinline__ void load(T (&v)[kDepth], const T* from) {
    const Chunk<T> chunk = load_shared(from);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) v[k] = chunk.v[k];
  }
  static __device__ __forceinline__ void load_a(A& a, const T* tile, int pitch) {
    const int g = lane_id() / 4;
    load(a.v[0], tile + g * pitch);
    load(a.v[1], tile + (g + 8) * pitch);
  }
  static __device__ __forceinline__ void load_a_transposed(A& a, const T* tile, int pitch) {
    const int g = lane_id() / 4;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      a.v[0][k] = tile[k * pitch + g];
      a.v[1][k] = tile[k * pitch + g + 8];
    }
  }
  static __device__ __forceinline__ void load_b(B (&b)[2], const T* tile, int pitch) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) load(b[i / 2].v[i % 2], tile + (i / 2 * 8 + 2 * q + i % 2) * pitch);
  }
  static __device__ __forceinline__ void load_b_transposed(B (&b)[2], const T* tile, int pitch) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        b[i / 2].v[i % 2][k] = tile[k * pitch + i / 2 * 8 + 2 * q + i % 2];
  }
  template <class Keep>
  static __device__ __forceinline__ void filter(A& a, const Keep& keep) {
    const int g = lane_id() / 4;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      if (!keep(g, k)) a.v[0][k] = 0;
      if (!keep(g + 8, k)) a.v[1][k] = 0;
    }
  }
  template <class Keep>
  static __device__ __forceinline__ void filter(B& b, const Keep& keep) {
    const int q = lane_id() % 4;
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      if (!keep(k, 2 * q)) b.v[0][k] = 0;
      if (!keep(k, 2 * q + 1)) b.v[1][k] = 0;
    }
  }
  static __device__ __forceinline__ void add(T (&sums)[4], const A& a, const B& b) {
#pragma unroll
    for (int k = 0; k < kDepth; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[i] = fma(a.v[i / 2][k], b.v[i % 2][k], sums[i]);
  }
};
template <>
struct Product<float> : WideProduct<float> {};
template <>
struct Product<double> : WideProduct<double> {};

// f(row, column, sum) for what this lane holds of [16, 8 kTiles].
template <int kTiles, class A, class F>
__device__ __forceinline__ void for_each_sum(A (&sums)[kTiles][4], const F& f) {
  const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) f(g + i / 2 * 8, 8 * j + 2 * q + i % 2, sums[j][i]);
}

// f(row, each) for the rows of them, where each(h) calls h(column, sum).
template <int kTiles, class A, class F>
__device__ __forceinline__ void for_each_row_of_sums(A (&sums)[kTiles][4], const F& f) {
  const int g = lane_id() / 4, q = lane_id() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    f(g + half * 8, [&](const auto& h) {
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
#pragma unroll
        for (int i = 0; i < 2; ++i) h(8 * j + 2 * q + i, sums[j][2 * half + i]);
    });
}

}  // namespace moelora::cuda
