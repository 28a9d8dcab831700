/* What nvcc's host code calls of the CUDA runtime, without a GPU: device memory is host memory, and
   launches go to a hook.  The kernels' binaries are ignored; the hook knows kernels by name.

   Built as a shared library under the name of the real one, for code that was linked with
   `-cudart shared`. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* The numbers of cudaError. */
enum {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidDeviceFunction = 98,
};
/* Of cudaDeviceAttr and cudaFuncAttribute. */
enum {
  kMultiProcessorCount = 16,
  kComputeCapabilityMajor = 75,
  kComputeCapabilityMinor = 76,
  kMaxSharedMemoryPerBlockOptin = 97,
  kMaxDynamicSharedMemorySize = 8
};

typedef struct {
  unsigned x, y, z;
} Dim3;
/* Returns a cudaError. */
typedef int (*LaunchHook)(const char* kernel, const unsigned* grid, const unsigned* block,
                          void** arguments, size_t shared);
typedef void (*AllocationHook)(void* data, size_t bytes);

static LaunchHook launch_hook;
static AllocationHook allocation_hook;
static int multiprocessors, shared_bytes, capability;
static int last_error;

/* ten_times: the compute capability */
void emulated_device(LaunchHook launch, AllocationHook allocation, int processors, int shared,
                     int ten_times) {
  launch_hook = launch;
  allocation_hook = allocation;
  multiprocessors = processors;
  shared_bytes = shared;
  capability = ten_times;
}

/* The code under test reports its own allocations. */
void emulated_allocation(void* data, size_t bytes) {
  if (allocation_hook) allocation_hook(data, bytes);
}

/* ---- registration, by constructors that nvcc writes */

enum { kMostKernels = 4096, kSharedWithoutAsking = 48 << 10 };
static struct {
  const void* stub;
  const char* name;
  size_t shared;
} kernels[kMostKernels];
static int kernel_count;

void** __cudaRegisterFatBinary(void* binary) {
  static void* handle;
  handle = binary;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void** handle) { (void)handle; }
void __cudaUnregisterFatBinary(void** handle) { (void)handle; }
void __cudaRegisterFunction(void** handle, const char* stub, char* device_stub, const char* name,
                            int thread_limit, void* thread, void* block, void* block_dim,
                            void* grid_dim, int* warp_size) {
  (void)handle, (void)device_stub, (void)thread_limit, (void)thread;
  (void)block, (void)block_dim, (void)grid_dim, (void)warp_size;
  if (kernel_count == kMostKernels) __builtin_trap();
  kernels[kernel_count].stub = stub;
  kernels[kernel_count].name = name;
  kernels[kernel_count++].shared = kSharedWithoutAsking;
}

static int find(const void* stub) {
  for (int i = 0; i < kernel_count; ++i)
    if (kernels[i].stub == stub) return i;
  return -1;
}

/* ---- launches */

static __thread struct {
  Dim3 grid, block;
  size_t shared;
  void* stream;
} configuration;

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configuration.grid = grid;
  configuration.block = block;
  configuration.shared = shared;
  configuration.stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  *grid = configuration.grid;
  *block = configuration.block;
  *shared = configuration.shared;
  *stream = configuration.stream;
  return kSuccess;
}
int __cudaGetKernel(void** kernel, const void* stub) {
  *kernel = (void*)stub;
  return kSuccess;
}

static int launch(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared) {
  const int i = find(stub);
  if (i < 0 || !launch_hook) return kInvalidDeviceFunction;
  const uint64_t threads = (uint64_t)block.x * block.y * block.z;
  if (!grid.x || !grid.y || !grid.z || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 ||
      !threads || threads > 1024 || block.z > 64)
    return kInvalidConfiguration;
  if (shared > kernels[i].shared) return kInvalidValue;
  return launch_hook(kernels[i].name, &grid.x, &block.x, arguments, shared);
}
int __cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                       void* stream) {
  (void)stream;
  return last_error = launch(stub, grid, block, arguments, shared);
}
int cudaLaunchKernel(const void* stub, Dim3 grid, Dim3 block, void** arguments, size_t shared,
                     void* stream) {
  return __cudaLaunchKernel(stub, grid, block, arguments, shared, stream);
}
int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  const int i = find(stub);
  if (i < 0) return kInvalidDeviceFunction;
  if (attribute != kMaxDynamicSharedMemorySize || value < 0 || value > shared_bytes)
    return kInvalidValue;
  kernels[i].shared = value;
  return kSuccess;
}

/* ---- the rest */

int cudaGetDevice(int* device) {
  *device = 0;
  return kSuccess;
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  if (attribute == kMultiProcessorCount)
    *value = multiprocessors;
  else if (attribute == kComputeCapabilityMajor)
    *value = capability / 10;
  else if (attribute == kComputeCapabilityMinor)
    *value = capability % 10;
  else if (attribute == kMaxSharedMemoryPerBlockOptin)
    *value = shared_bytes;
  else
    return kInvalidValue;
  return kSuccess;
}
int cudaGetLastError(void) {
  const int error = last_error;
  last_error = kSuccess;
  return error;
}
const char* cudaGetErrorString(int error) {
  switch (error) {
    case kSuccess: return "no error";
    case kInvalidValue: return "invalid argument";
    case kInvalidConfiguration: return "invalid configuration argument";
    case kInvalidDeviceFunction: return "invalid device function";
    default: return "launch failed in the emulator";
  }
}
int cudaMemsetAsync(void* data, int value, size_t bytes, void* stream) {
  (void)stream;
  memset(data, value, bytes);
  return kSuccess;
}
