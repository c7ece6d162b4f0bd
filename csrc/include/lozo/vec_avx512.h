// AVX-512 F, BW, DQ, VL; with LOZO_ISA_avx512_bf16 also VNNI and BF16.
#include <immintrin.h>

#define LOZO_MASKED_IO 1

namespace lozo {
namespace LOZO_ISA {

using F = __m512;
using I = __m512i;
using L = __m512i;
constexpr int W = 16;
constexpr int kRegisters = 32;

LOZO_INLINE F splat(float x) { return _mm512_set1_ps(x); }
LOZO_INLINE F load(const float *p) { return _mm512_loadu_ps(p); }
LOZO_INLINE void store(float *p, F x) { _mm512_storeu_ps(p, x); }
LOZO_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
LOZO_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
// sum + a * b rounded once; multiply_add is for results that are not promised in bits, and fused where that is fast.
LOZO_INLINE F fma(F a, F b, F sum) { return _mm512_fmadd_ps(a, b, sum); }
LOZO_INLINE F multiply_add(F a, F b, F sum) { return fma(a, b, sum); }
LOZO_INLINE float sum_lanes(F x) { return _mm512_reduce_add_ps(x); }
LOZO_INLINE F to_float(I x) { return _mm512_cvtepi32_ps(x); }

LOZO_INLINE I splat_int(int32_t x) { return _mm512_set1_epi32(x); }
LOZO_INLINE I load_int(const int32_t *p) { return _mm512_loadu_si512(p); }
LOZO_INLINE void store_int(int32_t *p, I x) { _mm512_storeu_si512(p, x); }
// x, negated in the lanes where a word has the lane's bit.
LOZO_INLINE F negate_where(F x, I words, I bits) {
  return _mm512_mask_xor_ps(x, _mm512_test_epi32_mask(words, bits), x, _mm512_set1_ps(-0.0f));
}
LOZO_INLINE I zero_int() { return _mm512_setzero_si512(); }

// sum + a * b over the two int16 of each lane.
LOZO_INLINE I dot_pairs(I sum, I a, I b) {
#if defined(LOZO_ISA_avx512_bf16)
  // Not the intrinsic: GCC 12 copies and spills the accumulators around it.
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "vm"(b));
  return sum;
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(a, b));
#endif
}

// The sum of a word's four bytes, minus 510.
LOZO_INLINE I byte_sums(I words) {
#if defined(LOZO_ISA_avx512_bf16)
  return _mm512_dpbusd_epi32(_mm512_set1_epi32(-510), words, _mm512_set1_epi8(1));
#else
  const I halves = _mm512_maddubs_epi16(words, _mm512_set1_epi8(1));
  return _mm512_add_epi32(_mm512_madd_epi16(halves, _mm512_set1_epi16(1)), _mm512_set1_epi32(-510));
#endif
}

LOZO_INLINE I subtract_bits(F x, uint32_t bits) {
  return _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32((int32_t)bits));
}

// Int16 pairs from the low halves of two vectors.
LOZO_INLINE I pack_pairs(I lo, I hi) { return _mm512_mask_blend_epi16(0xAAAAAAAAu, lo, _mm512_slli_epi32(hi, 16)); }

// W values of fp16 on the 2^-8 grid, in steps of the grid.
LOZO_INLINE I load_steps(const f16 *p) {
  const F x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
  return _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(256.0f)));
}

LOZO_INLINE Pair<I> deinterleave(Pair<I> x) {
  const I even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const I odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_permutex2var_epi32(x.a, even, x.b), _mm512_permutex2var_epi32(x.a, odd, x.b)};
}

LOZO_INLINE Pair<F> deinterleave(Pair<F> x) {
  const Pair<I> y = deinterleave(Pair<I>{_mm512_castps_si512(x.a), _mm512_castps_si512(x.b)});
  return {_mm512_castsi512_ps(y.a), _mm512_castsi512_ps(y.b)};
}
LOZO_INLINE Pair<F> interleave(Pair<F> x) {
  const I first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const I last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  return {_mm512_permutex2var_ps(x.a, first, x.b), _mm512_permutex2var_ps(x.a, last, x.b)};
}

LOZO_INLINE L splat_counter(uint32_t x) { return _mm512_set1_epi64((int64_t)x); }
LOZO_INLINE L consecutive_counters(uint32_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64((int64_t)first), _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
template <int APART>
LOZO_INLINE L spaced_counters(uint32_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64((int64_t)first),
                          _mm512_set_epi64(7 * APART, 6 * APART, 5 * APART, 4 * APART, 3 * APART, 2 * APART, APART, 0));
}
LOZO_INLINE L load_counters(const uint32_t *p) { return _mm512_cvtepu32_epi64(_mm256_loadu_si256((const __m256i *)p)); }
// The order from which unpack_quads makes contiguous words.
LOZO_INLINE L quad_counters(uint32_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64((int64_t)first), _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0));
}
// Only the low half of a lane counts as input; the high half of a result of multiply() is what high() brings down.
LOZO_INLINE L multiply(L a, L b) { return _mm512_mul_epu32(a, b); }
LOZO_INLINE L high(L a) { return _mm512_srli_epi64(a, 32); }
LOZO_INLINE L exclusive_or(L a, L b) { return _mm512_xor_si512(a, b); }
LOZO_INLINE L exclusive_or(L a, L b, L c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }

// Low halves of two vectors, alternating.
LOZO_INLINE I zip(L even, L odd) { return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, (_MM_PERM_ENUM)0xA0); }
LOZO_INLINE Pair<I> unpack_quads(I words01, I words23) {
  return {_mm512_unpacklo_epi64(words01, words23), _mm512_unpackhi_epi64(words01, words23)};
}
// pack_pairs of the two 32-bit integers of each 64-bit lane, stored as W / 2 integers.
LOZO_INLINE void store_adjacent_pairs(int32_t *p, I x) {
  const I pairs = _mm512_mask_blend_epi16(0x22222222u, x, _mm512_srli_epi64(x, 16));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi64_epi32(pairs));
}

LOZO_INLINE __mmask64 first_lanes(int64_t count) { return count >= 64 ? ~(__mmask64)0 : (((__mmask64)1) << count) - 1; }

template <>
struct Io<float> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> load(const float *p) { return {_mm512_loadu_ps(p), _mm512_loadu_ps(p + W)}; }
  LOZO_INLINE void store(float *p, Pair<F> y) {
    _mm512_storeu_ps(p, y.a);
    _mm512_storeu_ps(p + W, y.b);
  }
  LOZO_INLINE Pair<F> load_masked(const float *p, int64_t count) {
    const __mmask64 m = first_lanes(count);
    return {_mm512_maskz_loadu_ps((__mmask16)m, p), _mm512_maskz_loadu_ps((__mmask16)(m >> W), p + W)};
  }
  LOZO_INLINE void store_masked(float *p, Pair<F> y, int64_t count) {
    const __mmask64 m = first_lanes(count);
    _mm512_mask_storeu_ps(p, (__mmask16)m, y.a);
    _mm512_mask_storeu_ps(p + W, (__mmask16)(m >> W), y.b);
  }
};

// Rounds to nearest even, interleaved; NaN becomes the quiet NaN. Works on 16-bit lanes, twice as many at once: ``high`` is what
// truncation keeps, and it goes up by one if ``low`` is above the half, or at the half while ``high`` is odd.
LOZO_INLINE I round_to_bf16_exact(Pair<F> y) {
  const __mmask16 any = _mm512_cmp_ps_mask(y.a, y.b, _CMP_UNORD_Q);
  if (__builtin_expect(!_kortestz_mask16_u8(any, any), 0)) {
    const F nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
    y.a = _mm512_mask_mov_ps(y.a, _mm512_cmp_ps_mask(y.a, y.a, _CMP_UNORD_Q), nan);
    y.b = _mm512_mask_mov_ps(y.b, _mm512_cmp_ps_mask(y.b, y.b, _CMP_UNORD_Q), nan);
  }
  const I a = _mm512_castps_si512(y.a), b = _mm512_castps_si512(y.b);
  const I high = _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(a, 16), b);
  const I low = _mm512_mask_blend_epi16(0xAAAAAAAAu, a, _mm512_slli_epi32(b, 16));
  // (~high & 1) | 0x8000
  const I least = _mm512_ternarylogic_epi32(high, _mm512_set1_epi16(1), _mm512_set1_epi16(INT16_MIN), 0xAE);
  return _mm512_mask_add_epi16(high, _mm512_cmpge_epu16_mask(low, least), high, _mm512_set1_epi16(1));
}

#if defined(LOZO_ISA_avx512_bf16)
// The instruction takes denormals for zero, whatever MXCSR says.
LOZO_INLINE I round_to_bf16_flushing(Pair<F> y) {
  const I halves = (I)_mm512_cvtne2ps_pbh(y.b, y.a);
  const I order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                   18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}
#endif

LOZO_INLINE I round_to_bf16(Pair<F> y) {
#if defined(LOZO_ISA_avx512_bf16)
  constexpr int denormal = 0x20;
  const __mmask16 any = _kor_mask16(_mm512_fpclass_ps_mask(y.a, denormal), _mm512_fpclass_ps_mask(y.b, denormal));
  if (__builtin_expect(!_kortestz_mask16_u8(any, any), 0)) return round_to_bf16_exact(y);
  return round_to_bf16_flushing(y);
#else
  return round_to_bf16_exact(y);
#endif
}

template <>
struct Io<bf16> {
  static constexpr bool interleaved = true;
  LOZO_INLINE Pair<F> unpack(I x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int32_t)0xffff0000)))};
  }
  LOZO_INLINE Pair<F> load(const bf16 *p) { return unpack(_mm512_loadu_si512(p)); }
  LOZO_INLINE void store(bf16 *p, Pair<F> y) { _mm512_storeu_si512(p, round_to_bf16(y)); }
  LOZO_INLINE Pair<F> load_masked(const bf16 *p, int64_t count) {
    return unpack(_mm512_maskz_loadu_epi16((__mmask32)first_lanes(count), p));
  }
  LOZO_INLINE void store_masked(bf16 *p, Pair<F> y, int64_t count) {
    _mm512_mask_storeu_epi16(p, (__mmask32)first_lanes(count), round_to_bf16(y));
  }
};

template <>
struct Io<f16> {
  static constexpr bool interleaved = false;
  LOZO_INLINE Pair<F> unpack(I x) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(x)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1))};
  }
  LOZO_INLINE I pack(Pair<F> y) {
    constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtps_ph(y.a, mode)), _mm512_cvtps_ph(y.b, mode), 1);
  }
  LOZO_INLINE Pair<F> load(const f16 *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)), _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p + W)))};
  }
  LOZO_INLINE void store(f16 *p, Pair<F> y) { _mm512_storeu_si512(p, pack(y)); }
  LOZO_INLINE Pair<F> load_masked(const f16 *p, int64_t count) {
    return unpack(_mm512_maskz_loadu_epi16((__mmask32)first_lanes(count), p));
  }
  LOZO_INLINE void store_masked(f16 *p, Pair<F> y, int64_t count) {
    _mm512_mask_storeu_epi16(p, (__mmask32)first_lanes(count), pack(y));
  }
};

}  // namespace LOZO_ISA
}  // namespace lozo
