// Instructions that C++ cannot express.
#ifndef LOZO_CUDA_PTX_H
#define LOZO_CUDA_PTX_H

#include <stdint.h>

// c += A B for fp16 A (16 x 16) and B (16 x 8) in the fragments of mma.m16n8k16.
static __device__ __forceinline__ void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Rounds two fp32 to nearest even; the first goes into the low half.
static __device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ uint32_t pack_f16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

static __device__ __forceinline__ float f16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Returns the same value, but hides it from the compiler, which otherwise computes it before a loop and keeps it in a register.
static __device__ __forceinline__ uint32_t made_here(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}
static __device__ __forceinline__ uint64_t made_here(uint64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
template <class T>
static __device__ __forceinline__ T *made_here(T *p) {
  asm volatile("" : "+l"(p));
  return p;
}

// Keeps memory instructions that follow after this point.
static __device__ __forceinline__ void loads_end_here() { __syncwarp(); }

static __device__ __forceinline__ uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) { return __byte_perm(a, b, which); }

#endif
