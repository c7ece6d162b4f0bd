// NEON, which every 64-bit ARM processor has.
#include <arm_neon.h>

namespace lozo {
namespace LOZO_ISA {

using F = float32x4_t;
using I = int32x4_t;
using L = uint64x2_t;
constexpr int W = 4;
constexpr int kRegisters = 32;

LOZO_INLINE F splat(float x) { return vdupq_n_f32(x); }
LOZO_INLINE F load(const float *p) { return vld1q_f32(p); }
LOZO_INLINE void store(float *p, F x) { vst1q_f32(p, x); }
LOZO_INLINE F mul(F a, F b) { return vmulq_f32(a, b); }
LOZO_INLINE F add(F a, F b) { return vaddq_f32(a, b); }
// sum + a * b rounded once; multiply_add is for results that are not promised in bits, and fused where that is fast.
LOZO_INLINE F fma(F a, F b, F sum) { return vfmaq_f32(sum, a, b); }
LOZO_INLINE F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
LOZO_INLINE float sum_lanes(F x) { return vaddvq_f32(x); }
LOZO_INLINE F to_float(I x) { return vcvtq_f32_s32(x); }

LOZO_INLINE I splat_int(int32_t x) { return vdupq_n_s32(x); }
LOZO_INLINE I load_int(const int32_t *p) { return vld1q_s32(p); }
LOZO_INLINE void store_int(int32_t *p, I x) { vst1q_s32(p, x); }
// x, negated in the lanes where a word has the lane's bit.
LOZO_INLINE F negate_where(F x, I words, I bits) {
  const uint32x4_t sign = vshlq_n_u32(vtstq_s32(words, bits), 31);
  return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x), sign));
}
LOZO_INLINE I zero_int() { return vdupq_n_s32(0); }

// sum + a * b over the two int16 of each lane.
LOZO_INLINE I dot_pairs(I sum, I a, I b) {
  const int16x8_t x = vreinterpretq_s16_s32(a), y = vreinterpretq_s16_s32(b);
  return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(y)), vmull_high_s16(x, y)));
}

// The sum of a word's four bytes, minus 510.
LOZO_INLINE I byte_sums(I words) {
  const uint32x4_t sums = vpaddlq_u16(vpaddlq_u8(vreinterpretq_u8_s32(words)));
  return vsubq_s32(vreinterpretq_s32_u32(sums), vdupq_n_s32(510));
}

LOZO_INLINE I subtract_bits(F x, uint32_t bits) { return vsubq_s32(vreinterpretq_s32_f32(x), vdupq_n_s32((int32_t)bits)); }

// Int16 pairs from the low halves of two vectors.
LOZO_INLINE I pack_pairs(I lo, I hi) { return vsliq_n_s32(lo, hi, 16); }

LOZO_INLINE F load_half(const f16 *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)p))); }
LOZO_INLINE void store_half(f16 *p, F x) { vst1_u16((uint16_t *)p, vreinterpret_u16_f16(vcvt_f16_f32(x))); }

// W values of fp16 on the 2^-8 grid, in steps of the grid.
LOZO_INLINE I load_steps(const f16 *p) { return vcvtnq_s32_f32(vmulq_n_f32(load_half(p), 256.0f)); }

LOZO_INLINE Pair<I> deinterleave(Pair<I> x) { return {vuzp1q_s32(x.a, x.b), vuzp2q_s32(x.a, x.b)}; }
LOZO_INLINE Pair<F> deinterleave(Pair<F> x) { return {vuzp1q_f32(x.a, x.b), vuzp2q_f32(x.a, x.b)}; }
LOZO_INLINE Pair<F> interleave(Pair<F> x) { return {vzip1q_f32(x.a, x.b), vzip2q_f32(x.a, x.b)}; }

LOZO_INLINE L splat_counter(uint32_t x) { return vdupq_n_u64(x); }
template <int APART>
LOZO_INLINE L spaced_counters(uint32_t first) {
  return vcombine_u64(vcreate_u64(first), vcreate_u64((uint64_t)first + APART));
}
LOZO_INLINE L consecutive_counters(uint32_t first) { return spaced_counters<1>(first); }
LOZO_INLINE L load_counters(const uint32_t *p) { return vmovl_u32(vld1_u32(p)); }
// The order from which unpack_quads makes contiguous words.
LOZO_INLINE L quad_counters(uint32_t first) { return spaced_counters<1>(first); }
// Only the low half of a lane counts as input; the high half of a result of multiply() is what high() brings down.
LOZO_INLINE L multiply(L a, L b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
LOZO_INLINE L high(L a) { return vshrq_n_u64(a, 32); }
LOZO_INLINE L exclusive_or(L a, L b) { return veorq_u64(a, b); }
LOZO_INLINE L exclusive_or(L a, L b, L c) { return veorq_u64(a, veorq_u64(b, c)); }

// Low halves of two vectors, alternating.
LOZO_INLINE I zip(L even, L odd) { return vtrn1q_s32(vreinterpretq_s32_u64(even), vreinterpretq_s32_u64(odd)); }
LOZO_INLINE Pair<I> unpack_quads(I words01, I words23) {
  const int64x2_t x = vreinterpretq_s64_s32(words01), y = vreinterpretq_s64_s32(words23);
  return {vreinterpretq_s32_s64(vzip1q_s64(x, y)), vreinterpretq_s32_s64(vzip2q_s64(x, y))};
}
// pack_pairs of the two 32-bit integers of each 64-bit lane, stored as W / 2 integers.
LOZO_INLINE void store_adjacent_pairs(int32_t *p, I x) { vst1_s32(p, vreinterpret_s32_s16(vmovn_s32(x))); }

// Rounds to nearest even into the upper half of each lane; NaN becomes the quiet NaN.
LOZO_INLINE uint32x4_t round_to_upper_half(F y) {
  const uint32x4_t u = vreinterpretq_u32_f32(y), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(y, y), rounded, vdupq_n_u32(0x7fc00000));
}

template <>
struct Io<bf16> {
  static constexpr bool interleaved = true;
  LOZO_INLINE Pair<F> load(const bf16 *p) {
    const uint32x4_t x = vreinterpretq_u32_u16(vld1q_u16((const uint16_t *)p));
    return {vreinterpretq_f32_u32(vshlq_n_u32(x, 16)), vreinterpretq_f32_u32(vandq_u32(x, vdupq_n_u32(0xffff0000)))};
  }
  LOZO_INLINE void store(bf16 *p, Pair<F> y) {
    const uint32x4_t x = vsriq_n_u32(round_to_upper_half(y.b), round_to_upper_half(y.a), 16);
    vst1q_u16((uint16_t *)p, vreinterpretq_u16_u32(x));
  }
};

}  // namespace LOZO_ISA
}  // namespace lozo

#include "lozo/vec_halves.h"
