// CUDA on the CPU, for tests: what csrc/cuda/device.h gives the kernels there, here. A block's threads are fibers that run in turn;
// instructions of a whole warp, and barriers of a block, are where they wait for each other. It checks what a GPU would not
// forgive: alignment, accesses outside the tensors, and lanes that miss an instruction of their warp.
#ifndef LOZO_EMULATOR_H
#define LOZO_EMULATOR_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <functional>

#define LOZO_DEVICE static inline
#define LOZO_NO_UNROLL
#define __global__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern dim3 threadIdx, blockIdx;

namespace emulator {

// Returns whether a kernel did what a GPU would not forgive; last_failure() says what.
int run_grid(int64_t blocks, int threads, const std::function<void()> &kernel);
const char *last_failure();
void wait_for_block();
// Gives every lane of the warp the ``words`` that each of them brought: [lane][word].
const uint32_t (*exchange(const uint32_t *words, int count, int instruction))[16];
int lane();
void check_access(const void *p, int64_t bytes, bool write);
float f16_to_float(uint16_t bits);
uint16_t float_to_f16(float value);
uint16_t float_to_bf16(float value);

}  // namespace emulator

template <class V>
static inline V load_global(const V *p) {
  emulator::check_access(p, sizeof(V), false);
  return *p;
}

template <class V>
static inline void store_global(V *p, V value) {
  emulator::check_access(p, sizeof(V), true);
  *p = value;
}

static inline void __syncthreads() { emulator::wait_for_block(); }

static inline unsigned long long atomicAdd(unsigned long long *p, unsigned long long value) {
  const unsigned long long before = *p;
  *p += value;
  return before;
}

static inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}

static inline uint32_t select_bytes(uint32_t a, uint32_t b, uint32_t which) {
  const uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (uint32_t)(bytes >> (which >> 4 * i & 7) * 8 & 255) << 8 * i;
  return out;
}

template <class T>
static inline T made_here(T value) {
  return value;
}
static inline void loads_end_here() {}
static inline float f16_to_float(uint16_t bits) { return emulator::f16_to_float(bits); }
static inline uint32_t pack_f16(float low, float high) {
  return emulator::float_to_f16(low) | (uint32_t)emulator::float_to_f16(high) << 16;
}
static inline uint32_t pack_bf16(float low, float high) {
  return emulator::float_to_bf16(low) | (uint32_t)emulator::float_to_bf16(high) << 16;
}

void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <class Argument>
static inline int run_kernel(void (*kernel)(Argument), int64_t blocks, int threads, Argument argument, int64_t, void *) {
  return emulator::run_grid(blocks, threads, [&] { kernel(argument); });
}

template <class Argument>
static inline int probe_kernel(void (*)(Argument), int64_t) {
  return 0;
}

static inline const char *error_message(int) { return emulator::last_failure(); }

#endif
