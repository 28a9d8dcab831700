// What every kernel uses: element types, 16-byte copies into shared memory, dropout bits,
// launching.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/ptx.cuh"
#include "mix/philox.h"

namespace moelora::cuda {

template <class T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of 16 bytes, the widest access.
template <class T>
constexpr int kChunk = 16 / sizeof(T);
template <class T>
struct alignas(16) Chunk {
  T v[kChunk<T>];
};
template <class T>
__device__ __forceinline__ Chunk<T> load_shared(const T* from) {
  return *reinterpret_cast<const Chunk<T>*>(from);
}
template <class T>
__device__ __forceinline__ void store_shared(T* to, const Chunk<T>& chunk) {
  *reinterpret_cast<Chunk<T>*>(to) = chunk;
}
// The intrinsic is one access; the compiler takes a struct of 16-bit elements apart.
template <class T>
__device__ __forceinline__ void store_global(T* to, const Chunk<T>& chunk) {
  uint4 bits;
  memcpy(&bits, &chunk, sizeof bits);
  __stcg(reinterpret_cast<uint4*>(to), bits);
}
template <class T>
__device__ __forceinline__ Chunk<T> load_global(const T* from) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(from));
  Chunk<T> chunk;
  memcpy(&chunk, &bits, sizeof bits);
  return chunk;
}

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_id() { return threadIdx.x / 32; }

template <class T>
__device__ __forceinline__ bool aligned16(const T* p, int64_t ld = 0) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(ld * sizeof(T))) & 15) == 0;
}

// ---------------------------------------------------------------- copies into shared memory

// `valid` elements of a chunk, then zeros.  In the background if aligned; either way it is there
// after copy_async_wait and a barrier.
template <class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int valid, bool aligned) {
  if (aligned) {
    ptx::copy_async16(to, from, valid * static_cast<int>(sizeof(T)));
    return;
  }
  Chunk<T> chunk;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) chunk.v[i] = i < valid ? from[i] : T(0.0f);
  store_shared(to, chunk);
}

// Columns [c0, c0 + width) of matrix rows into a tile; zeros from `columns` on, and where row(i) is
// null.  Eight threads share a row.
//   tile [rows, width], pitch: a multiple of a chunk, like width
//   row(i) address of column 0 of row i
template <class T, class Row>
__device__ __forceinline__ void copy_rows(T* tile, int pitch, int rows, int width, int64_t c0,
                                          int64_t columns, bool aligned, int thread, int threads,
                                          const Row& row) {
  for (int i = thread / 8; i < rows; i += threads / 8) {
    const T* from = row(i);
    for (int c = thread % 8 * kChunk<T>; c < width; c += 8 * kChunk<T>) {
      const int64_t left = from ? columns - c0 - c : 0;
      const int valid = left < 0 ? 0 : left < kChunk<T> ? static_cast<int>(left) : kChunk<T>;
      copy_chunk(tile + i * pitch + c, from + c0 + c, valid, aligned);
    }
  }
}

// The tokens of a tile: tokens(i), and there is one for i < end; behind it any number.
struct AllTokens {
  int64_t end;
  __device__ int64_t operator()(int64_t i) const { return i; }
};

// Row c of the experts' rows and then the others.
template <class T>
struct RowAddress {
  const T *experts, *others;
  int R;
  int64_t columns, ld;

  __device__ RowAddress(const Rows& rows, int64_t columns)
      : experts(static_cast<const T*>(rows.experts)),
        others(static_cast<const T*>(rows.others)),
        R(rows.R),
        columns(columns),
        ld(rows.ld ? rows.ld : columns) {}
  __device__ bool aligned() const { return aligned16(experts, ld) && aligned16(others, columns); }
  __device__ const T* operator()(int c) const {
    return c < R ? experts + c * ld : others + (c - R) * columns;
  }
};

// Pointers `distance` elements further.
template <class T>
__device__ __forceinline__ void advance(const void*& p, int64_t distance) {
  if (p) p = static_cast<const T*>(p) + distance;
}
template <class T>
__device__ __forceinline__ void advance(void*& p, int64_t distance) {
  p = static_cast<T*>(p) + distance;
}

// ---------------------------------------------------------------- dropout

// Columns of coefficients that see the same mask: all experts' or one's, and the others' none.
struct MaskGroup {
  int begin, end;
  bool masked;
  uint32_t expert;
};
__device__ __forceinline__ int mask_groups(const Rows& rows, const Masks& masks) {
  return (masks.per_expert ? rows.R / rows.r : 1) + (rows.extra ? 1 : 0);
}
__device__ __forceinline__ MaskGroup mask_group(const Rows& rows, const Masks& masks, int i) {
  const int experts = masks.per_expert ? rows.R / rows.r : 1;
  if (i == experts) return {rows.R, rows.R + rows.extra, false, 0};
  const bool masked = masks.seed != nullptr;
  if (!masks.per_expert) return {0, rows.R, masked, 0};
  return {i * rows.r, (i + 1) * rows.r, masked, static_cast<uint32_t>(masks.first + i)};
}

__device__ __forceinline__ Dropout load_dropout(const Masks& masks) {
  return make_dropout(masks.seed ? *masks.seed : 0, masks.p);
}

// The mask of 16 tokens by 16 features, across a warp: a lane draws one counter's eight features.
class KeepTile {
 public:
  //   tokens(t0 + i) row i;  feature of the first column, a multiple of 8
  template <class Tokens>
  __device__ KeepTile(const Dropout& d, const Tokens& tokens, int64_t t0, int64_t feature,
                      uint32_t expert) {
    uint32_t words[4][1];
    philox_words<1>(d, static_cast<uint32_t>(feature / 8) + lane_id() / 16,
                    static_cast<uint64_t>(tokens(t0 + lane_id() % 16)), expert, words);
    bits_ = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      bits_ |= uint32_t{(words[w][0] & 0xFFFF) >= d.threshold} << (2 * w);
      bits_ |= uint32_t{(words[w][0] >> 16) >= d.threshold} << (2 * w + 1);
    }
  }
  // All lanes of the warp must ask together.
  __device__ bool operator()(int token, int feature) const {
    return __shfl_sync(~0u, bits_, token + 16 * (feature / 8)) >> (feature % 8) & 1;
  }

 private:
  uint32_t bits_;
};

// ---------------------------------------------------------------- launching

inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("moelora_ops: ") + kernel + ": " +
                             cudaGetErrorString(error));
}

template <class... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared,
            void* stream, const std::type_identity_t<Parameters>&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared)),
          name);
  kernel<<<grid, threads, shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
}

// f(i) for every element, in a grid of flat_grid(size) blocks of kFlatThreads.
constexpr int kFlatThreads = 256;
inline dim3 flat_grid(int64_t size) {
  constexpr int kPerThread = 4;
  return dim3(
      static_cast<unsigned>((size + kFlatThreads * kPerThread - 1) / (kFlatThreads * kPerThread)));
}
template <class F>
__device__ __forceinline__ void for_each_flat(int64_t size, const F& f) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size;
       i += stride)
    f(i);
}

// f(std::type_identity<T>) for the element type.
template <class F>
void dispatch(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32: return f(std::type_identity<float>{});
    case DType::kBFloat16: return f(std::type_identity<__nv_bfloat16>{});
    case DType::kFloat16: return f(std::type_identity<__half>{});
    case DType::kFloat64: return f(std::type_identity<double>{});
  }
}

template <class I>
__host__ __device__ constexpr I ceil_div(I a, I b) {
  return (a + b - 1) / b;
}

}  // namespace moelora::cuda
