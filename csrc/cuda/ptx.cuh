// All inline PTX of the package: kernels call these wrappers and contain none themselves.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moelora::cuda::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory in the background: `valid` of them from `from`, then zeros.
__device__ __forceinline__ void copy_async16(void* to, const void* from, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid)
               : "memory");
}
// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until all but the latest `kPending` groups of this thread have arrived.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += a b for a 16 x 16 times 16 x 8 tile.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2], __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---------------------------------------------------------------- compute capability 9.0 alone

// Whether this code is for it: of the wrappers below, the other binaries have none.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr bool kHasWgmma = true;
#else
constexpr bool kHasWgmma = false;
#endif

// What this thread has written to shared memory, and what of it has arrived in the background, is
// there for what reads it through the async proxy behind the next barrier.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Orders this warp's accesses to the sums before the products that are issued next.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until all but the latest `kPending` groups of products are done: the sums have them, and
// their operands are no longer read.
template <int kPending, int kTiles>
__device__ __forceinline__ void wgmma_wait(float (&sums)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  // Emits nothing: the compiler must not read the sums before they are waited for.
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(sums[j][i])::"memory");
}

// How wgmma is told of a tile: rows of 128 bytes, groups of eight of them one after the other, the
// 16-byte chunks of row i permuted by an exclusive-or with i % 8 (the 128-byte swizzle).
//   tile  where such a group begins, a multiple of 1024 bytes, plus the columns to skip
__device__ __forceinline__ uint64_t wgmma_operand(const void* tile) {
  constexpr uint64_t kSwizzle = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnusedWithSwizzle = uint64_t{1} << 16;
  return kSwizzle | kEightRows | kUnusedWithSwizzle | (shared_address(tile) & 0x3FFFF) >> 4;
}

// Issues, for a warp group, sums = (add ? sums : 0) + a b for a 64 x 16 times 16 x 192 tile.  Its
// threads hold of the 16 rows of their warp what they hold of a tile of mma.
//   a [64, 16], b [192, 16]: 16 columns of tiles as wgmma_operand has them
#define MOELORA_SUMS(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define MOELORA_WGMMA(type)                                                                       \
  asm volatile(                                                                                   \
      "{\n"                                                                                       \
      ".reg .pred p;\n"                                                                           \
      "setp.ne.b32 p, %98, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n192k16.f32." type "." type                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                  \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "          \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "          \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "          \
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "          \
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "         \
      "%96, %97, p, 1, 1, 0, 0;\n"                                                                \
      "}"                                                                                         \
      : MOELORA_SUMS(0), MOELORA_SUMS(1), MOELORA_SUMS(2), MOELORA_SUMS(3), MOELORA_SUMS(4),      \
        MOELORA_SUMS(5), MOELORA_SUMS(6), MOELORA_SUMS(7), MOELORA_SUMS(8), MOELORA_SUMS(9),      \
        MOELORA_SUMS(10), MOELORA_SUMS(11), MOELORA_SUMS(12), MOELORA_SUMS(13), MOELORA_SUMS(14), \
        MOELORA_SUMS(15), MOELORA_SUMS(16), MOELORA_SUMS(17), MOELORA_SUMS(18), MOELORA_SUMS(19), \
        MOELORA_SUMS(20), MOELORA_SUMS(21), MOELORA_SUMS(22), MOELORA_SUMS(23)                    \
      : "l"(wgmma_operand(a)), "l"(wgmma_operand(b)), "r"(static_cast<int>(add))                  \
      : "memory")
__device__ __forceinline__ void wgmma(float (&c)[24][4], const __nv_bfloat16* a,
                                      const __nv_bfloat16* b, bool add) {
  MOELORA_WGMMA("bf16");
}
__device__ __forceinline__ void wgmma(float (&c)[24][4], const __half* a, const __half* b,
                                      bool add) {
  MOELORA_WGMMA("f16");
}
#undef MOELORA_WGMMA
#undef MOELORA_SUMS

}  // namespace moelora::cuda::ptx
