// The words of CUDA's headers that NVIDIA's package for its runtime leaves to the compiler's: for a
// compiler of C that knows no devices, most of them mean nothing.
#pragma once

#define __host__
#define __device__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __cudart_builtin__
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)
#define __noinline__ __attribute__((noinline))
#define CUDARTAPI
#define CUDARTAPI_CDECL
#define CUDAAPI
