// Weights through fp32 scratch and back with stochastic rounding.
#ifndef LOZO_ROUNDING_H
#define LOZO_ROUNDING_H

#include "lozo/abi.h"
#include "noise_vec.h"

namespace lozo {
namespace LOZO_ISA {

template <class T>
static inline void read_row(float *y, const T *x, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kBlock) {
    const int64_t count = cols - j;
    Pair<F> block = count >= kBlock ? Io<T>::load(x + j) : load_partial(x + j, count);
    if (Io<T>::interleaved) block = interleave(block);
    if (count >= kBlock) {
      Io<float>::store(y + j, block);
    } else {
      store_partial(y + j, block, count);
    }
  }
}

LOZO_INLINE uint32_t is_finite(uint32_t u) { return (u & 0x7f800000u) != 0x7f800000u; }

// reference.round_stochastic except for the last conversion, which is exact, or overflows.
LOZO_INLINE uint32_t add_random(bf16, uint32_t u, uint32_t bits) {
  const uint32_t quiet = (u & 0x7fffffffu) > 0x7f800000u ? u | 0x00400000u : u;
  return (is_finite(u) ? u + bits : quiet) & 0xffff0000u;
}

LOZO_INLINE uint32_t add_random(f16, uint32_t u, uint32_t bits) {
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = is_finite(u) ? (u + (bits >> 3)) & 0xffffe000u : u;
  // Below 2^-14 fp16 has a fixed grid of 2^-24: count its steps, with 16 more bits to round by.
  const float small = float_from_bits(magnitude < 0x38800000u ? magnitude : 0u);
  const int32_t steps = (int32_t)((uint32_t)(int32_t)(small * 0x1p40f) + bits) >> 16;
  const uint32_t subnormal = bits_from_float((float)steps * 0x1p-24f) | (u & 0x80000000u);
  return magnitude < 0x38800000u ? subnormal : normal;
}

LOZO_INLINE void write_block(bf16 *x, const uint32_t *u) {
  for (int i = 0; i < kBlock; ++i) x[i].bits = (uint16_t)(u[i] >> 16);
}

LOZO_INLINE void write_block(f16 *x, const uint32_t *u) {
  float y[kBlock];
  memcpy(y, u, sizeof y);
  Io<f16>::store(x, {load(y), load(y + W)});
}

struct RoundingKey {
  uint64_t seed;
  int64_t step, index, tensor_id;
};

LOZO_INLINE RoundingKey rounding_key(const lozo_call &call, const lozo_tensor &tensor) {
  return {call.seed, call.rounding_step, call.rounding_index, tensor.tensor_id};
}

constexpr int kRoundingBatch = 2 * kBlock;  // elements whose bits one call of flat_words makes, 8 from each counter

// Plain loops over arrays, which compilers vectorise.
template <class T>
LOZO_INLINE void round_batch(T *x, const float *y, const Counters &counters, uint32_t counter) {
  Pair<I> words[1];
  flat_words<false>(words, counters, counter);
  alignas(64) uint32_t w[kBlock], bits[kRoundingBatch], u[kRoundingBatch];
  memcpy(w, &words[0].a, sizeof(I));
  memcpy(w + W, &words[0].b, sizeof(I));
  for (int i = 0; i < kBlock; ++i) {
    bits[2 * i] = w[i] & 0xffffu;
    bits[2 * i + 1] = w[i] >> 16;
  }
  memcpy(u, y, sizeof u);
  for (int i = 0; i < kRoundingBatch; ++i) u[i] = add_random(T(), u[i], bits[i]);
  write_block(x, u);
  write_block(x + kBlock, u + kBlock);
}

// x <- y rounded by the bits of the flat elements from ``element``.
template <class T>
static inline void write_row_stochastic(T *x, const float *y, int64_t cols, int64_t element, const RoundingKey &key) {
  Counters counters;
  int64_t high_bits = -1;
  for (int64_t j = -(element & (kRoundingBatch - 1)); j < cols; j += kRoundingBatch) {
    const int64_t counter = (element + j) >> 3;
    if (counter >> 32 != high_bits) {
      high_bits = counter >> 32;
      counters = make_counters(key.seed, direction_word(high_bits, key.index), (uint32_t)key.tensor_id,
                               draw_word(kStreamRounding, key.step));
    }
    if (j >= 0 && j + kRoundingBatch <= cols) {
      round_batch(x + j, y + j, counters, (uint32_t)counter);
      continue;
    }
    const int64_t from = j < 0 ? -j : 0, to = cols - j < kRoundingBatch ? cols - j : kRoundingBatch;
    alignas(64) float in[kRoundingBatch] = {};
    alignas(64) T out[kRoundingBatch];
    memcpy(in + from, y + j + from, (to - from) * sizeof(float));
    round_batch(out, in, counters, (uint32_t)counter);
    memcpy(x + j + from, out + from, (to - from) * sizeof(T));
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
