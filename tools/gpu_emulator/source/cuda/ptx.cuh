// Twins of the wrappers in csrc/cuda/ptx.cuh, which this file replaces: what each instruction does,
// in C++.  What an instruction reads or writes is touched in this file, which sanitizers see, and
// by the lane that names it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace moelora::cuda::ptx {

inline void land(const emulated::Copy& copy) {
  for (int i = 0; i < copy.bytes; ++i) copy.to[i] = i < copy.valid ? copy.from[i] : 0;
  emulated::copied(copy.to);
}

inline void copy_async16(void* to, const void* from, int valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(valid ? from : nullptr)) & 15)
    emulated::fault("copy_async16: address is not a multiple of 16");
  const emulated::Copy copy = {static_cast<char*>(to), static_cast<const char*>(from), valid, 16};
  if (emulated::lands_at_once())
    land(copy);
  else
    emulated::copy_later(copy);
}
inline void copy_async_commit() { emulated::end_group(); }
template <int kPending>
void copy_async_wait() {
  for (emulated::Copy copy; emulated::next_due(kPending, &copy);) land(copy);
}

struct alignas(16) MatrixRow {
  uint16_t v[8];
};
inline void load_matrices(uint32_t (&m)[4], const void* row) {
  const MatrixRow mine = *static_cast<const MatrixRow*>(row);
  const auto all = emulated::meet("load_matrices", mine);
  const unsigned own = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) memcpy(&m[i], &all.lane[8 * i + own].v[column], sizeof m[i]);
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  const MatrixRow mine = *static_cast<const MatrixRow*>(row);
  const auto all = emulated::meet("load_matrices_transposed", mine);
  const unsigned column = threadIdx.x % 32 / 4, first = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) {
    const MatrixRow* pair = &all.lane[8 * i + first];
    m[i] = pair[0].v[column] | uint32_t{pair[1].v[column]} << 16;
  }
}

// Lane 4 g + q holds, as pairs in words: of a rows g and g + 8, columns 2 q and 2 q + 8; of b
// column g, rows 2 q and 2 q + 8; of c rows g and g + 8, columns 2 q and 2 q + 1.
template <class T>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], T) {
  struct Operands {
    T a[4][2], b[2][2];
  } mine;
  memcpy(mine.a, a, sizeof a);
  memcpy(mine.b, b, sizeof b);
  const auto all = emulated::meet("multiply_add", mine);
  const unsigned g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k) {
      const Operands& row = all.lane[4 * g + k % 8 / 2];
      const Operands& column = all.lane[4 * (2 * q + i % 2) + k % 8 / 2];
      c[i] += static_cast<float>(row.a[k / 8 * 2 + i / 2][k % 2]) *
              static_cast<float>(column.b[k / 8][k % 2]);
    }
}

// ---------------------------------------------------------------- compute capability 9.0 alone

constexpr bool kHasWgmma = true;

inline void fence_async_proxy() { emulated::fence_async_proxy(); }
inline void wgmma_fence() {}
inline void wgmma_commit() { emulated::end_product_group(); }

// The element of an operand's row, of which `tile` says where column 0 is.
template <class T>
float swizzled(const char* tile, int row, int column) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(tile) + row * 128 + column * sizeof(T);
  return static_cast<float>(*reinterpret_cast<const T*>(at ^ (at >> 7 & 7) << 4));
}
template <class T>
void land(const emulated::Product& p) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, warp = threadIdx.x / 32 % 4;
  if (threadIdx.x % 32 == 0) {
    const auto rows = [](const char* tile) {
      return tile - reinterpret_cast<uintptr_t>(tile) % 128;
    };
    emulated::read_async(rows(p.a) + 16 * warp * 128, 16 * 128);
    emulated::read_async(rows(p.b), 8 * p.tiles * 128);
  }
  float a[2][16];
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 16; ++k) a[i][k] = swizzled<T>(p.a, 16 * warp + g + 8 * i, k);
  for (int j = 0; j < p.tiles; ++j)
    for (int c = 0; c < 2; ++c) {
      float product[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float b = swizzled<T>(p.b, 8 * j + 2 * q + c, k);
        for (int i = 0; i < 2; ++i) product[i] += a[i][k] * b;
      }
      for (int i = 0; i < 2; ++i) {
        float& sum = p.sums[j][2 * i + c];
        sum = (p.add ? sum : 0) + product[i];
      }
    }
}
template <class T>
void wgmma(float (&c)[24][4], const T* a, const T* b, bool add) {
  const emulated::Product mine = {
      c, 24, reinterpret_cast<const char*>(a), reinterpret_cast<const char*>(b), add, land<T>};
  struct Same {
    const char *a, *b;
    bool add;
  };
  for (const Same& other : emulated::meet("wgmma", Same{mine.a, mine.b, add}).lane)
    if (other.a != mine.a || other.b != mine.b || other.add != add)
      emulated::fault("wgmma: lanes disagree on its operands");
  emulated::multiply_later(mine);
  if (!emulated::lands_at_once()) return;
  for (emulated::Product product; emulated::next_due(-1, &product);) product.land(product);
}
template <int kPending, int kTiles>
void wgmma_wait(float (&)[kTiles][4]) {
  for (emulated::Product product; emulated::next_due(kPending, &product);) product.land(product);
}

}  // namespace moelora::cuda::ptx
