// The noise contract on vectors: counters of which only c0 differs between lanes.
#ifndef LOZO_NOISE_VEC_H
#define LOZO_NOISE_VEC_H

#include "lozo/vec.h"

namespace lozo {
namespace LOZO_ISA {

// What all lanes share, with those products of the first two rounds that depend on nothing else.
struct Counters {
  uint32_t k0[10], k1[10];
  uint32_t x2_round1;  // c3 ^ key, is combined with the high half of M0 * c0
  uint32_t x1_round2;  // low half of M1 * c2 ^ key
  uint32_t x2_round2;  // high half of M0 * x0 ^ key
  uint32_t x2_round3;  // low half of M0 * x0 ^ key
};

LOZO_INLINE Counters make_counters(uint64_t seed, uint32_t c1, uint32_t c2, uint32_t c3) {
  Counters s;
  for (int round = 0; round < 10; ++round) {
    s.k0[round] = (uint32_t)seed + (uint32_t)round * kPhiloxW0;
    s.k1[round] = (uint32_t)(seed >> 32) + (uint32_t)round * kPhiloxW1;
  }
  const uint64_t b = (uint64_t)kPhiloxM1 * c2;
  const uint32_t x0 = (uint32_t)(b >> 32) ^ c1 ^ s.k0[0];
  const uint64_t a = (uint64_t)kPhiloxM0 * x0;
  s.x2_round1 = c3 ^ s.k1[0];
  s.x1_round2 = (uint32_t)b ^ s.k0[1];
  s.x2_round2 = (uint32_t)(a >> 32) ^ s.k1[1];
  s.x2_round3 = (uint32_t)a ^ s.k1[2];
  return s;
}

struct Words {
  L w[4];  // in the low halves of the lanes
};

// N vectors of counters side by side: a round is a chain of dependent instructions, and several chains fill the waiting time.
template <int N>
LOZO_INLINE void philox(Words (&x)[N], const Counters &s, const L (&c0)[N]) {
  const L m0 = splat_counter(kPhiloxM0), m1 = splat_counter(kPhiloxM1);
  L x0[N], x1[N], x2[N], x3[N];
  for (int i = 0; i < N; ++i) {
    L a = multiply(c0[i], m0);
    x2[i] = exclusive_or(high(a), splat_counter(s.x2_round1));
    L b = multiply(x2[i], m1);
    x0[i] = exclusive_or(high(b), splat_counter(s.x1_round2)), x1[i] = b;
    x2[i] = exclusive_or(a, splat_counter(s.x2_round2));
    a = multiply(x0[i], m0), b = multiply(x2[i], m1);
    x0[i] = exclusive_or(high(b), x1[i], splat_counter(s.k0[2])), x1[i] = b;
    x2[i] = exclusive_or(high(a), splat_counter(s.x2_round3)), x3[i] = a;
  }
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 8
#else
#pragma unroll
#endif
  for (int round = 3; round < 10; ++round) {
    for (int i = 0; i < N; ++i) {
      const L a = multiply(x0[i], m0), b = multiply(x2[i], m1);
      x0[i] = exclusive_or(high(b), x1[i], splat_counter(s.k0[round])), x1[i] = b;
      x2[i] = exclusive_or(high(a), x3[i], splat_counter(s.k1[round])), x3[i] = a;
    }
  }
  for (int i = 0; i < N; ++i) x[i] = {{x0[i], x1[i], x2[i], x3[i]}};
}

LOZO_INLINE Words philox(const Counters &s, L c0) {
  Words x[1];
  philox(x, s, {c0});
  return x[0];
}

// The words of N blocks of 2 W consecutive elements, the first of which has the counter ``quad``.
template <bool interleaved, int N>
LOZO_INLINE void flat_words(Pair<I> (&words)[N], const Counters &s, uint32_t quad) {
  L c0[N];
  Words x[N];
  for (int i = 0; i < N; ++i) {
    const uint32_t first = quad + (uint32_t)(i * kCounters);
    c0[i] = interleaved ? consecutive_counters(first) : quad_counters(first);
  }
  philox(x, s, c0);
  for (int i = 0; i < N; ++i) {
    const L(&w)[4] = x[i].w;
    words[i] = interleaved ? Pair<I>{zip(w[0], w[2]), zip(w[1], w[3])} : unpack_quads(zip(w[0], w[1]), zip(w[2], w[3]));
  }
}

// The bit of each element of a block, whose lowest 2 W bits are those of a word.
template <bool interleaved>
struct LaneBits {
  alignas(64) int32_t a[W] = {}, b[W] = {};
  constexpr LaneBits() {
    for (int i = 0; i < W; ++i) {
      a[i] = (int32_t)(1u << (interleaved ? 2 * i : i));
      b[i] = (int32_t)(1u << (interleaved ? 2 * i + 1 : W + i));
    }
  }
};

template <bool interleaved>
LOZO_INLINE Pair<I> lane_bits() {
  static constexpr LaneBits<interleaved> bits;
  return {load_int(bits.a), load_int(bits.b)};
}

LOZO_INLINE F normal(I words) {
  const F x = to_float(byte_sums(words)), q = mul(x, x);
  F p = mul(q, splat(float_from_bits(kNormalBits[0])));
  p = mul(add(p, splat(float_from_bits(kNormalBits[1]))), q);
  p = mul(add(p, splat(float_from_bits(kNormalBits[2]))), q);
  return mul(x, add(p, splat(float_from_bits(kNormalBits[3]))));
}

// normal() rounded to the grid, counted in steps of 2^-8.
LOZO_INLINE I normal_steps(I words) { return subtract_bits(add(normal(words), splat(float_from_bits(kGridBits))), kGridBits); }

// U or V of ``rows`` rows from global row ``first``, as int16 pairs of neighbouring ranks in steps of 2^-8:
// out[pair * stride + row], for (rank + 1) / 2 pairs. Rows up to a multiple of W / 2 are written. An odd rank's last pair is half.
static inline void factor_pairs(int32_t *out, int64_t stride, uint64_t seed, Stream stream, int64_t draw, int64_t direction,
                                int64_t tensor_id, uint64_t first, int64_t rows, int rank) {
  const int pairs = (rank + 1) / 2;
  for (int group = 0; group * 4 < rank; ++group) {
    const Counters s = make_counters(seed, direction_word(group, direction), (uint32_t)tensor_id, draw_word(stream, draw));
    int32_t *p = out + 2 * group * stride;
    const bool second = 2 * group + 1 < pairs;
    for (int64_t i = 0; i < rows; i += kCounters) {
      const Words x = philox(s, consecutive_counters((uint32_t)(first + (uint64_t)i)));
      store_adjacent_pairs(p + i, normal_steps(zip(x.w[0], x.w[1])));
      if (second) store_adjacent_pairs(p + stride + i, normal_steps(zip(x.w[2], x.w[3])));
    }
  }
  if (rank % 2) {
    int32_t *last = out + (pairs - 1) * stride;
    for (int64_t i = 0; i < rows; ++i) last[i] &= 0xffff;
  }
}

// U in fp32: four floats out[row * stride + 4 * group] for every group of four ranks, those beyond ``rank`` included.
// ``counters_at(i)`` returns those of rows i to i + W / 2. Rows up to a multiple of W are written.
template <class CountersAt>
static inline void factor_floats(float *out, int64_t stride, uint64_t seed, int64_t draw, int64_t direction, int64_t tensor_id,
                                 int64_t rows, int rank, CountersAt counters_at) {
  const F unit = splat(kGridStep);
  for (int group = 0; group * 4 < rank; ++group, out += 4) {
    const Counters s = make_counters(seed, direction_word(group, direction), (uint32_t)tensor_id, draw_word(kStreamU, draw));
    for (int64_t i = 0; i < rows; i += W) {
      Words x[2];
      philox(x, s, {counters_at(i), counters_at(i + kCounters)});
      for (int half = 0; half < 2; ++half) {
        const L(&w)[4] = x[half].w;
        const Pair<I> words = unpack_quads(zip(w[0], w[1]), zip(w[2], w[3]));
        alignas(64) float even[W], odd[W];
        store(even, mul(to_float(normal_steps(words.a)), unit));
        store(odd, mul(to_float(normal_steps(words.b)), unit));
        float *row = out + (i + half * kCounters) * stride;
        for (int c = 0; c < kCounters / 2; ++c, row += 2 * stride) {
          memcpy(row, even + 4 * c, 4 * sizeof(float));
          memcpy(row + stride, odd + 4 * c, 4 * sizeof(float));
        }
      }
    }
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
