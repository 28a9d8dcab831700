// What the kernels of csrc/cuda use of the CUDA language and runtime, for a C++ compiler on the
// CPU.  Found before CUDA's header of this name; runs on fibres.cpp.
#pragma once

#include <math.h>
#include <string.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
// Of the thread that runs; fibres.cpp keeps them.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream);
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);  // of a launch: what its kernel did wrong
template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*)(Parameters...), cudaFuncAttribute, int) {
  return cudaSuccess;
}

namespace emulated {

// `shared` bytes of the block that runs, at a multiple of kSharedAlignment.
constexpr size_t kSharedAlignment = 1024;
char* shared_memory();

// Runs `thread` for every thread of every block.
void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread);
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared,
                   cudaStream_t, const Arguments&... arguments) {
  launch(grid, block, shared, [&] { kernel(arguments...); });
}

// Ends the launch with this error; the thread does not go on.
[[noreturn]] void fault(const char* what);

// The lanes of a warp wait for each other, and each learns what all have brought.
//   operation  must be the same for all
//   mine       `size` bytes; all [32, size] out
//   ordered    what a lane wrote before is visible to the others after, as by __syncwarp
constexpr size_t kMostBrought = 32;
void meet(const char* operation, const void* mine, size_t size, void* all, bool ordered);
template <class Brought>
struct Lanes {
  Brought lane[32];
};
template <class Brought>
Lanes<Brought> meet(const char* operation, const Brought& mine) {
  static_assert(sizeof(Brought) <= kMostBrought);
  Lanes<Brought> all;
  meet(operation, &mine, sizeof mine, &all, false);
  return all;
}

// A copy in the background.  It lands when it is issued or when it is waited for, whatever the
// seed says: nothing in between is more early or more late.
struct Copy {
  char* to;
  const char* from;
  int valid, bytes;  // `valid` bytes, then zeros
};
bool lands_at_once();
void copy_later(const Copy& copy);
void end_group();
// The next copy that waiting for all but `pending` groups takes, if there is one; -1: the group
// that has not ended too.
bool next_due(int pending, Copy* copy);

// A thread's share of a warp group's product, [16 rows of its warp, 8 tiles], in the background
// likewise: operands are read and sums written when it lands.
struct Product {
  float (*sums)[4];  // [tiles]
  int tiles;
  const char *a, *b;
  bool add;
  void (*land)(const Product& product);
};
void multiply_later(const Product& product);
void end_product_group();
bool next_due(int pending, Product* product);

// Copies write through the generic proxy.  What reads through the async one faults if the thread
// that brought these 16 bytes has not fenced them since.  (Stores are not known here.)
void copied(const char* shared);
void fence_async_proxy();
void read_async(const char* shared, size_t bytes);

}  // namespace emulated

template <class T>
T __ldcg(const T* from) {
  return *from;
}
template <class T>
void __stcg(T* to, T value) {
  *to = value;
}
void __syncthreads();
inline void __syncwarp() { emulated::meet("__syncwarp", nullptr, 0, nullptr, true); }
template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  if (~mask) emulated::fault("__shfl_sync: only whole warps are known here");
  return emulated::meet("__shfl_sync", value).lane[lane % 32];
}
