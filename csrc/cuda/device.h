// What the kernels need from CUDA, under a few names of their own. python_tests/cuda_host has the same names for the CPU, so that
// the kernels can be run, and their bits compared, without a GPU.
#ifndef LOZO_CUDA_DEVICE_H
#define LOZO_CUDA_DEVICE_H

#if defined(LOZO_EMULATE)

#include "emulator.h"

#else

#include <cuda_runtime.h>
#include <stdint.h>

#include "ptx.h"

#define LOZO_DEVICE static __device__ __forceinline__
#define LOZO_NO_UNROLL _Pragma("unroll 1")

// Addresses come from a table, so the compiler cannot see which memory they are in.
template <class V>
LOZO_DEVICE V load_global(const V *p) {
  __builtin_assume(__isGlobal(p));
  return *p;
}

template <class V>
LOZO_DEVICE void store_global(V *p, V value) {
  __builtin_assume(__isGlobal(p));
  *p = value;
}

// Runs a kernel of one-dimensional blocks; returns a cudaError_t.
template <class Argument>
static inline int run_kernel(void (*kernel)(Argument), int64_t blocks, int threads, Argument argument, int64_t device,
                             void *stream) {
  if (blocks <= 0) return cudaSuccess;
  const cudaError_t error = cudaSetDevice((int)device);
  if (error != cudaSuccess) return error;
  void *arguments[] = {&argument};
  return cudaLaunchKernel((const void *)kernel, dim3((unsigned)blocks), dim3((unsigned)threads), arguments, 0,
                          (cudaStream_t)stream);
}

// Whether a device has code for a kernel; returns a cudaError_t.
template <class Argument>
static inline int probe_kernel(void (*kernel)(Argument), int64_t device) {
  const cudaError_t error = cudaSetDevice((int)device);
  if (error != cudaSuccess) return error;
  cudaFuncAttributes attributes;
  const cudaError_t missing = cudaFuncGetAttributes(&attributes, (const void *)kernel);
  if (missing != cudaSuccess) (void)cudaGetLastError();
  return missing;
}

static inline const char *error_message(int error) { return cudaGetErrorString((cudaError_t)error); }

#endif

#include "lozo/noise.h"

#endif
