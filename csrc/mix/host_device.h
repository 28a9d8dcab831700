// What lets one source be row mathematics on the CPU and in a CUDA kernel.
#pragma once

#if defined(__CUDACC__)
#define MOELORA_HD __host__ __device__ __forceinline__
#else
#define MOELORA_HD inline
#endif
