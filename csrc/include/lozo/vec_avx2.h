// AVX2, FMA, F16C.
#include <immintrin.h>

namespace lozo {
namespace LOZO_ISA {

using F = __m256;
using I = __m256i;
using L = __m256i;
constexpr int W = 8;
constexpr int kRegisters = 16;

LOZO_INLINE F splat(float x) { return _mm256_set1_ps(x); }
LOZO_INLINE F load(const float *p) { return _mm256_loadu_ps(p); }
LOZO_INLINE void store(float *p, F x) { _mm256_storeu_ps(p, x); }
LOZO_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
LOZO_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
// sum + a * b rounded once; multiply_add is for results that are not promised in bits, and fused where that is fast.
LOZO_INLINE F fma(F a, F b, F sum) { return _mm256_fmadd_ps(a, b, sum); }
LOZO_INLINE F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
LOZO_INLINE float sum_lanes(F x) {
  const __m128 halves = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 pair = _mm_add_ps(halves, _mm_movehl_ps(halves, halves));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
LOZO_INLINE F to_float(I x) { return _mm256_cvtepi32_ps(x); }

LOZO_INLINE I splat_int(int32_t x) { return _mm256_set1_epi32(x); }
LOZO_INLINE I load_int(const int32_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
LOZO_INLINE void store_int(int32_t *p, I x) { _mm256_storeu_si256((__m256i *)p, x); }
// x, negated in the lanes where a word has the lane's bit.
LOZO_INLINE F negate_where(F x, I words, I bits) {
  const I set = _mm256_cmpeq_epi32(_mm256_and_si256(words, bits), bits);
  return _mm256_xor_ps(x, _mm256_and_ps(_mm256_castsi256_ps(set), _mm256_set1_ps(-0.0f)));
}
LOZO_INLINE I zero_int() { return _mm256_setzero_si256(); }

// sum + a * b over the two int16 of each lane.
LOZO_INLINE I dot_pairs(I sum, I a, I b) { return _mm256_add_epi32(sum, _mm256_madd_epi16(a, b)); }

// The sum of a word's four bytes, minus 510.
LOZO_INLINE I byte_sums(I words) {
  const I halves = _mm256_maddubs_epi16(words, _mm256_set1_epi8(1));
  return _mm256_add_epi32(_mm256_madd_epi16(halves, _mm256_set1_epi16(1)), _mm256_set1_epi32(-510));
}

LOZO_INLINE I subtract_bits(F x, uint32_t bits) {
  return _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32((int32_t)bits));
}

// Int16 pairs from the low halves of two vectors.
LOZO_INLINE I pack_pairs(I lo, I hi) { return _mm256_blend_epi16(lo, _mm256_slli_epi32(hi, 16), 0xAA); }

// W values of fp16 on the 2^-8 grid, in steps of the grid.
LOZO_INLINE I load_steps(const f16 *p) {
  const F x = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
  return _mm256_cvtps_epi32(_mm256_mul_ps(x, _mm256_set1_ps(256.0f)));
}

LOZO_INLINE Pair<I> deinterleave(Pair<I> x) {
  const F a = _mm256_castsi256_ps(x.a), b = _mm256_castsi256_ps(x.b);
  const I even = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88)), odd = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xDD));
  return {_mm256_permute4x64_epi64(even, 0xD8), _mm256_permute4x64_epi64(odd, 0xD8)};
}

LOZO_INLINE Pair<F> deinterleave(Pair<F> x) {
  const Pair<I> y = deinterleave(Pair<I>{_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)});
  return {_mm256_castsi256_ps(y.a), _mm256_castsi256_ps(y.b)};
}
LOZO_INLINE Pair<F> interleave(Pair<F> x) {
  const F lo = _mm256_unpacklo_ps(x.a, x.b), hi = _mm256_unpackhi_ps(x.a, x.b);
  return {_mm256_permute2f128_ps(lo, hi, 0x20), _mm256_permute2f128_ps(lo, hi, 0x31)};
}

LOZO_INLINE L splat_counter(uint32_t x) { return _mm256_set1_epi64x((int64_t)x); }
LOZO_INLINE L consecutive_counters(uint32_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x((int64_t)first), _mm256_set_epi64x(3, 2, 1, 0));
}
template <int APART>
LOZO_INLINE L spaced_counters(uint32_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x((int64_t)first), _mm256_set_epi64x(3 * APART, 2 * APART, APART, 0));
}
LOZO_INLINE L load_counters(const uint32_t *p) { return _mm256_cvtepu32_epi64(_mm_loadu_si128((const __m128i *)p)); }
// The order from which unpack_quads makes contiguous words.
LOZO_INLINE L quad_counters(uint32_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x((int64_t)first), _mm256_set_epi64x(3, 1, 2, 0));
}
// Only the low half of a lane counts as input; the high half of a result of multiply() is what high() brings down.
LOZO_INLINE L multiply(L a, L b) { return _mm256_mul_epu32(a, b); }
LOZO_INLINE L high(L a) { return _mm256_srli_epi64(a, 32); }
LOZO_INLINE L exclusive_or(L a, L b) { return _mm256_xor_si256(a, b); }
LOZO_INLINE L exclusive_or(L a, L b, L c) { return _mm256_xor_si256(a, _mm256_xor_si256(b, c)); }

// Low halves of two vectors, alternating.
LOZO_INLINE I zip(L even, L odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
LOZO_INLINE Pair<I> unpack_quads(I words01, I words23) {
  return {_mm256_unpacklo_epi64(words01, words23), _mm256_unpackhi_epi64(words01, words23)};
}
// pack_pairs of the two 32-bit integers of each 64-bit lane, stored as W / 2 integers.
LOZO_INLINE void store_adjacent_pairs(int32_t *p, I x) {
  const I pairs = _mm256_blend_epi16(x, _mm256_srli_epi64(x, 16), 0x22);
  const I even = _mm256_permutevar8x32_epi32(pairs, _mm256_set_epi32(6, 4, 2, 0, 6, 4, 2, 0));
  _mm_storeu_si128((__m128i *)p, _mm256_castsi256_si128(even));
}

template <>
struct Io<float> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + W)}; }
  LOZO_INLINE void store(float *p, Pair<F> y) {
    _mm256_storeu_ps(p, y.a);
    _mm256_storeu_ps(p + W, y.b);
  }
};

// Rounds to nearest even, interleaved; NaN becomes the quiet NaN. Works on 16-bit lanes, twice as many at once: ``high`` is what
// truncation keeps, and it goes up by one if ``low`` is above the half, or at the half while ``high`` is odd.
LOZO_INLINE I round_to_bf16(Pair<F> y) {
  if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(y.a, y.b, _CMP_UNORD_Q)), 0)) {
    const F nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    y.a = _mm256_blendv_ps(y.a, nan, _mm256_cmp_ps(y.a, y.a, _CMP_UNORD_Q));
    y.b = _mm256_blendv_ps(y.b, nan, _mm256_cmp_ps(y.b, y.b, _CMP_UNORD_Q));
  }
  const I a = _mm256_castps_si256(y.a), b = _mm256_castps_si256(y.b);
  const I high = _mm256_blend_epi16(_mm256_srli_epi32(a, 16), b, 0xAA), low = _mm256_blend_epi16(a, _mm256_slli_epi32(b, 16), 0xAA);
  const I odd = _mm256_and_si256(high, _mm256_set1_epi16(1)), above_half = _mm256_xor_si256(low, _mm256_set1_epi16(INT16_MIN));
  return _mm256_sub_epi16(high, _mm256_cmpgt_epi16(_mm256_adds_epi16(above_half, odd), _mm256_setzero_si256()));
}

template <>
struct Io<bf16> {
  static constexpr bool interleaved = true;
  LOZO_INLINE Pair<F> load(const bf16 *p) {
    const I x = _mm256_loadu_si256((const __m256i *)p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int32_t)0xffff0000)))};
  }
  LOZO_INLINE void store(bf16 *p, Pair<F> y) { _mm256_storeu_si256((__m256i *)p, round_to_bf16(y)); }
};

template <>
struct Io<f16> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> load(const f16 *p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + W)))};
  }
  LOZO_INLINE void store(f16 *p, Pair<F> y) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(y.a, mode));
    _mm_storeu_si128((__m128i *)(p + W), _mm256_cvtps_ph(y.b, mode));
  }
};

}  // namespace LOZO_ISA
}  // namespace lozo
