// The noise contract (lozo_kernels/kernels/noise.py), scalar, for host and device code.
#ifndef LOZO_NOISE_H
#define LOZO_NOISE_H

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define LOZO_FN static __host__ __device__ __forceinline__
#else
// Internal linkage: each instruction set keeps a copy of its own, so that a linker cannot give an older machine code for a newer
// one.
#define LOZO_FN static inline
#endif

// Rounded operations that no compiler may contract; host code relies on -ffp-contract=off. LOZO_FMA is a * b + c rounded once.
#if defined(__CUDA_ARCH__)
#define LOZO_MUL(a, b) __fmul_rn(a, b)
#define LOZO_ADD(a, b) __fadd_rn(a, b)
#define LOZO_FMA(a, b, c) __fmaf_rn(a, b, c)
#else
#define LOZO_MUL(a, b) ((a) * (b))
#define LOZO_ADD(a, b) ((a) + (b))
#define LOZO_FMA(a, b, c) __builtin_fmaf(a, b, c)
#endif

#if defined(__CUDACC__)
#define LOZO_UNROLL _Pragma("unroll")
#else
#define LOZO_UNROLL
#endif

namespace lozo {

enum Stream : uint32_t {
  kStreamU = 0,
  kStreamV = 1,
  kStreamZ = 2,
  kStreamS = 3,
  kStreamSigns = 4,
  kStreamRowSigns = 5,
  kStreamColumnSigns = 6,
  kStreamRounding = 8,
};

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// fp32 bit patterns of the polynomial, highest power first, and of 1.5 * 2^15, whose unit in the last place is 2^-8.
constexpr uint32_t kNormalBits[4] = {0x207c3b8fu, 0xa9065b6eu, 0x31b0c331u, 0x3bd4a59cu};
constexpr uint32_t kGridBits = 0x47400000u;
constexpr float kGridStep = 1.0f / 256.0f;

LOZO_FN float float_from_bits(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

LOZO_FN uint32_t bits_from_float(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}

LOZO_FN uint32_t draw_word(Stream stream, int64_t draw) { return (uint32_t)stream << 28 | (uint32_t)draw; }

// c1 of a factor's counters (index = k >> 2), or of a flat stream's (index = the counter's bits above 32).
LOZO_FN uint32_t direction_word(int64_t index, int64_t direction) { return (uint32_t)index | (uint32_t)direction << 8; }

LOZO_FN uint64_t multiply_wide(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__)
  // Of C++ code the compiler makes two instructions, the second of which adds zero.
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
#else
  return (uint64_t)a * b;
#endif
}

LOZO_FN void philox_round(uint32_t c[4], uint32_t k0, uint32_t k1) {
  const uint64_t a = multiply_wide(kPhiloxM0, c[0]), b = multiply_wide(kPhiloxM1, c[2]);
  c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
  c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
  c[1] = (uint32_t)b;
  c[3] = (uint32_t)a;
}

LOZO_FN void philox(uint32_t c[4], uint64_t seed) {
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  LOZO_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1) philox_round(c, k0, k1);
}

// The sum of a word's bytes, minus 510.
LOZO_FN float byte_sum(uint32_t w) {
#if defined(__CUDA_ARCH__) || defined(LOZO_EMULATE)
  // Adds into the last bits of 2^23: two instructions at full rate, exact.
  return LOZO_ADD(float_from_bits(__dp4a(w, 0x01010101u, 0x4b000000u)), -8389118.0f);
#else
  return (float)((int)((w & 255) + ((w >> 8) & 255) + ((w >> 16) & 255) + (w >> 24)) - 510);
#endif
}

LOZO_FN float normal(uint32_t w) {
  constexpr uint32_t c3 = kNormalBits[0], c2 = kNormalBits[1], c1 = kNormalBits[2], c0 = kNormalBits[3];
  const float x = byte_sum(w), q = LOZO_MUL(x, x);
  float p = LOZO_MUL(q, float_from_bits(c3));
  p = LOZO_MUL(LOZO_ADD(p, float_from_bits(c2)), q);
  p = LOZO_MUL(LOZO_ADD(p, float_from_bits(c1)), q);
  return LOZO_MUL(x, LOZO_ADD(p, float_from_bits(c0)));
}

// The nearest multiple of 2^-8, counted in steps of 2^-8, which is in the last bits of z + 1.5 * 2^15.
LOZO_FN int grid_steps(float z) { return (int)(bits_from_float(LOZO_ADD(z, float_from_bits(kGridBits))) - kGridBits); }

}  // namespace lozo

#endif
