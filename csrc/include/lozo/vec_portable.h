// Plain C++ with the vector extension of GCC and Clang, which every target lowers to what it has (SSE2, NEON, or scalars).
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace lozo {
namespace LOZO_ISA {

constexpr int W = 4;
constexpr int kRegisters = 8;  // of the oldest targets; kernels for single ranks would gain nothing
typedef float F __attribute__((vector_size(16)));
typedef int32_t I __attribute__((vector_size(16)));
typedef uint32_t Bits __attribute__((vector_size(16)));
struct L {
  uint64_t lane[W / 2];
};

LOZO_INLINE F splat(float x) { return F{x, x, x, x}; }
LOZO_INLINE F load(const float *p) {
  F x = {};
  memcpy(&x, p, sizeof x);
  return x;
}
LOZO_INLINE void store(float *p, F x) { memcpy(p, &x, sizeof x); }
LOZO_INLINE F mul(F a, F b) { return a * b; }
LOZO_INLINE F add(F a, F b) { return a + b; }
// sum + a * b rounded once; multiply_add is for results that are not promised in bits, and fused where that is fast.
LOZO_INLINE F fma(F a, F b, F sum) {
  F y;
  for (int i = 0; i < W; ++i) y[i] = __builtin_fmaf(a[i], b[i], sum[i]);
  return y;
}
LOZO_INLINE F multiply_add(F a, F b, F sum) { return a * b + sum; }
LOZO_INLINE float sum_lanes(F x) { return (x[0] + x[2]) + (x[1] + x[3]); }
LOZO_INLINE F to_float(I x) { return __builtin_convertvector(x, F); }

LOZO_INLINE I splat_int(int32_t x) { return I{x, x, x, x}; }
LOZO_INLINE I load_int(const int32_t *p) {
  I x;
  memcpy(&x, p, sizeof x);
  return x;
}
LOZO_INLINE void store_int(int32_t *p, I x) { memcpy(p, &x, sizeof x); }
// x, negated in the lanes where a word has the lane's bit.
LOZO_INLINE F negate_where(F x, I words, I bits) { return (F)((Bits)x ^ ((Bits)((words & bits) == bits) & 0x80000000u)); }
LOZO_INLINE I zero_int() { return I{}; }

// sum + a * b over the two int16 of each lane.
LOZO_INLINE I dot_pairs(I sum, I a, I b) {
#if defined(__SSE2__)
  return sum + (I)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  const I low_a = (I)((Bits)a << 16) >> 16, low_b = (I)((Bits)b << 16) >> 16;
  return sum + low_a * low_b + (a >> 16) * (b >> 16);
#endif
}

// The sum of a word's four bytes, minus 510.
LOZO_INLINE I byte_sums(I words) {
  const Bits w = (Bits)words, halves = (w & 0x00ff00ff) + ((w >> 8) & 0x00ff00ff);
  return (I)((halves & 0xffff) + (halves >> 16)) - 510;
}

LOZO_INLINE I subtract_bits(F x, uint32_t bits) { return (I)((Bits)x - bits); }

// Int16 pairs from the low halves of two vectors.
LOZO_INLINE I pack_pairs(I lo, I hi) { return (I)(((Bits)lo & 0xffff) | (Bits)hi << 16); }

typedef uint16_t Halves __attribute__((vector_size(8)));

LOZO_INLINE Bits choose(I mask, Bits yes, Bits no) { return ((Bits)mask & yes) | (~(Bits)mask & no); }

LOZO_INLINE F load_half(const f16 *p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  const Bits u = __builtin_convertvector(h, Bits), magnitude = (u & 0x7fff) << 13;
  // The exponent's bias differs by 112; multiplying normalises the subnormals too.
  const Bits value = (Bits)((F)magnitude * 0x1p112f);
  const Bits infinite = (Bits)(magnitude >= 0x0f800000) & 0x7f800000;
  return (F)(value | infinite | (u & 0x8000) << 16);
}

LOZO_INLINE void store_half(f16 *p, F x) {
  const Bits u = (Bits)x, magnitude = u & 0x7fffffff;
  const Bits normal = (magnitude - (112u << 23) + 0x0fff + (magnitude >> 13 & 1)) >> 13;
  // Below 2^-14 the sum with 1/2 has the unit 2^-24 of the subnormals, so that the addition rounds to it.
  const Bits subnormal = (Bits)((F)magnitude + 0.5f) - 0x3f000000;
  Bits y = choose((I)(magnitude < 0x38800000), subnormal, normal);
  y = choose((I)(magnitude >= 0x47800000), Bits{} + 0x7c00, y);
  y = choose((I)(magnitude > 0x7f800000), Bits{} + 0x7e00, y) | (u >> 16 & 0x8000);
  const Halves h = __builtin_convertvector(y, Halves);
  memcpy(p, &h, sizeof h);
}

// W values of fp16 on the 2^-8 grid, in steps of the grid.
LOZO_INLINE I load_steps(const f16 *p) { return __builtin_convertvector(load_half(p) * 256.0f, I); }

LOZO_INLINE Pair<I> deinterleave(Pair<I> x) { return {I{x.a[0], x.a[2], x.b[0], x.b[2]}, I{x.a[1], x.a[3], x.b[1], x.b[3]}}; }

LOZO_INLINE Pair<F> deinterleave(Pair<F> x) { return {F{x.a[0], x.a[2], x.b[0], x.b[2]}, F{x.a[1], x.a[3], x.b[1], x.b[3]}}; }
LOZO_INLINE Pair<F> interleave(Pair<F> x) { return {F{x.a[0], x.b[0], x.a[1], x.b[1]}, F{x.a[2], x.b[2], x.a[3], x.b[3]}}; }

LOZO_INLINE L splat_counter(uint32_t x) { return {{x, x}}; }
LOZO_INLINE L consecutive_counters(uint32_t first) { return {{first, first + 1}}; }
template <int APART>
LOZO_INLINE L spaced_counters(uint32_t first) {
  return {{first, first + APART}};
}
LOZO_INLINE L load_counters(const uint32_t *p) { return {{p[0], p[1]}}; }
// The order from which unpack_quads makes contiguous words.
LOZO_INLINE L quad_counters(uint32_t first) { return {{first, first + 1}}; }
// Only the low half of a lane counts as input; the high half of a result of multiply() is what high() brings down.
LOZO_INLINE L multiply(L a, L b) {
  return {{(uint64_t)(uint32_t)a.lane[0] * (uint32_t)b.lane[0], (uint64_t)(uint32_t)a.lane[1] * (uint32_t)b.lane[1]}};
}
LOZO_INLINE L high(L a) { return {{a.lane[0] >> 32, a.lane[1] >> 32}}; }
LOZO_INLINE L exclusive_or(L a, L b) { return {{a.lane[0] ^ b.lane[0], a.lane[1] ^ b.lane[1]}}; }
LOZO_INLINE L exclusive_or(L a, L b, L c) { return exclusive_or(exclusive_or(a, b), c); }

// Low halves of two vectors, alternating.
LOZO_INLINE I zip(L even, L odd) {
  return I{(int32_t)even.lane[0], (int32_t)odd.lane[0], (int32_t)even.lane[1], (int32_t)odd.lane[1]};
}
LOZO_INLINE Pair<I> unpack_quads(I words01, I words23) {
  return {I{words01[0], words01[1], words23[0], words23[1]}, I{words01[2], words01[3], words23[2], words23[3]}};
}
// pack_pairs of the two 32-bit integers of each 64-bit lane, stored as W / 2 integers.
LOZO_INLINE void store_adjacent_pairs(int32_t *p, I x) {
  p[0] = (int32_t)(((uint32_t)x[0] & 0xffff) | (uint32_t)x[1] << 16);
  p[1] = (int32_t)(((uint32_t)x[2] & 0xffff) | (uint32_t)x[3] << 16);
}

// Round to nearest even into the upper half of each lane; NaN becomes the quiet NaN.
LOZO_INLINE Bits round_to_upper_half(F y) {
  const Bits u = (Bits)y, rounded = u + 0x7fff + (u >> 16 & 1), nan = (Bits)(y != y);
  return (rounded & ~nan) | (nan & 0x7fc00000);
}

template <>
struct Io<bf16> {
  static constexpr bool interleaved = true;
  LOZO_INLINE Pair<F> load(const bf16 *p) {
    Bits x;
    memcpy(&x, p, sizeof x);
    const Bits low = x << 16, high = x & 0xffff0000;
    return first_is_low ? Pair<F>{(F)low, (F)high} : Pair<F>{(F)high, (F)low};
  }
  LOZO_INLINE void store(bf16 *p, Pair<F> y) {
    const Bits even = round_to_upper_half(y.a), odd = round_to_upper_half(y.b);
    const Bits x = first_is_low ? even >> 16 | (odd & 0xffff0000) : odd >> 16 | (even & 0xffff0000);
    memcpy(p, &x, sizeof x);
  }

 private:
  static constexpr bool first_is_low = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__;
};

}  // namespace LOZO_ISA
}  // namespace lozo

#include "lozo/vec_halves.h"
