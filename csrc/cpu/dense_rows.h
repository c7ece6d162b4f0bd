// A run of flat elements: decay, then the dense noise of each draw, then N.
#ifndef LOZO_DENSE_ROWS_H
#define LOZO_DENSE_ROWS_H

#include "lozo/abi.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {

constexpr int kAtOnce = kRegisters > 8 ? 2 : 1;  // blocks whose Philox rounds run side by side
// Bytes. Hardware prefetchers follow a stream to the end of its page, and begin anew on the next.
constexpr int64_t kPageAhead = 4096;

// How N enters. There may be none. Momentum: N decays, takes up the noise and is stored, and is added times alpha. Merge: N is only
// read, and is added after the noise was added to it.
enum class Kept { kNone, kMomentum, kMerged };

LOZO_INLINE Pair<F> sum(Pair<F> x, Pair<F> y) { return {add(x.a, y.a), add(x.b, y.b)}; }

struct DenseArguments {
  float scales[LOZO_MAX_DRAWS], coefficients[LOZO_MAX_DRAWS];
  float alpha, beta, decay;
};

// What makes the noise of a run. prepare() makes ready what begins at an element, the first of a block, and returns where it ends.
// words() are the random bits of blocks, values() the noise that one block has of them, times() its products.

// Z: normal numbers.
struct Normals {
  const lozo_call &call;
  int64_t tensor_id;
  Counters counters[LOZO_MAX_DRAWS];

  template <int DRAWS>
  LOZO_INLINE_METHOD int64_t prepare(int64_t element) {
    const int64_t high = element >> 34;
    for (int d = 0; d < DRAWS; ++d)
      counters[d] = make_counters(call.seed, direction_word(high, call.directions[d]), (uint32_t)tensor_id,
                                  draw_word(kStreamZ, call.draw_steps[d]));
    return (high + 1) << 34;
  }
  template <bool interleaved, int BLOCKS>
  LOZO_INLINE_METHOD void words(Pair<I> (&words)[BLOCKS], int d, int64_t element) const {
    flat_words<interleaved>(words, counters[d], (uint32_t)(element >> 2));
  }
  LOZO_INLINE Pair<F> values(Pair<I> words) { return {normal(words.a), normal(words.b)}; }
  template <bool interleaved>
  LOZO_INLINE Pair<F> times(Pair<F> z, F x) {
    return {mul(z.a, x), mul(z.b, x)};
  }
};

// Signs, for so many elements at once as the words of kAtOnce vectors of counters have bits.
struct Signs {
  static constexpr int kWords = kAtOnce * kBlock;
  static constexpr int64_t kElements = 32 * kWords;

  const lozo_call &call;
  int64_t tensor_id;
  alignas(64) int32_t bits[LOZO_MAX_DRAWS][kWords];

  template <int DRAWS>
  LOZO_INLINE_METHOD int64_t prepare(int64_t element) {
    const int64_t begin = element & -kElements, counter = begin >> 7;
    for (int d = 0; d < DRAWS; ++d) {
      Pair<I> made[kAtOnce];
      flat_words<false>(made,
                        make_counters(call.seed, direction_word(counter >> 32, call.directions[d]), (uint32_t)tensor_id,
                                      draw_word(kStreamSigns, call.draw_steps[d])),
                        (uint32_t)counter);
      memcpy(bits[d], made, sizeof made);
    }
    return begin + kElements;
  }
  template <bool interleaved, int BLOCKS>
  LOZO_INLINE_METHOD void words(Pair<I> (&words)[BLOCKS], int d, int64_t element) const {
    for (int i = 0; i < BLOCKS; ++i, element += kBlock) {
      const uint32_t word = (uint32_t)bits[d][(element & (kElements - 1)) >> 5];
      words[i].a = words[i].b = splat_int((int32_t)(word >> (element & 31)));
    }
  }
  LOZO_INLINE Pair<I> values(Pair<I> words) { return words; }
  template <bool interleaved>
  LOZO_INLINE Pair<F> times(Pair<I> z, F x) {
    const Pair<I> lanes = lane_bits<interleaved>();
    return {negate_where(x, z.a, lanes.a), negate_where(x, z.b, lanes.b)};
  }
};

// BLOCKS times 2 W elements from the flat element ``element`` on. Without decay its factor is 1, which changes nothing.
template <class T, int DRAWS, Kept KEPT, int BLOCKS, class Noise>
LOZO_INLINE void update_blocks(T *out, const T *x, float *n, const Noise &noise, int64_t element, const DenseArguments &a) {
  constexpr bool interleaved = Io<T>::interleaved, momentum = KEPT == Kept::kMomentum, merged = KEPT == Kept::kMerged;
  Pair<F> y[BLOCKS], m[BLOCKS];
  for (int i = 0; i < BLOCKS; ++i) {
    y[i] = Io<T>::load(x + i * kBlock);
    y[i] = {mul(y[i].a, splat(a.decay)), mul(y[i].b, splat(a.decay))};
    if (momentum || merged) {
      m[i] = Io<float>::load(n + i * kBlock);
      if (interleaved) m[i] = deinterleave(m[i]);
    }
    if (momentum) m[i] = {mul(m[i].a, splat(a.beta)), mul(m[i].b, splat(a.beta))};
  }
  for (int d = 0; d < DRAWS; ++d) {
    Pair<I> words[BLOCKS];
    noise.template words<interleaved>(words, d, element);
    const F scale = splat(a.scales[d]), coefficient = splat(merged ? a.scales[d] : a.coefficients[d]);
    for (int i = 0; i < BLOCKS; ++i) {
      const auto z = Noise::values(words[i]);
      if (!merged) y[i] = sum(y[i], Noise::template times<interleaved>(z, scale));
      if (momentum || merged) m[i] = sum(m[i], Noise::template times<interleaved>(z, coefficient));
    }
  }
  for (int i = 0; i < BLOCKS; ++i) {
    if (momentum) {
      y[i] = sum(y[i], {mul(m[i].a, splat(a.alpha)), mul(m[i].b, splat(a.alpha))});
      Io<float>::store(n + i * kBlock, interleaved ? interleave(m[i]) : m[i]);
    }
    if (merged) y[i] = sum(y[i], m[i]);
    Io<T>::store(out + i * kBlock, y[i]);
  }
}

// ``count`` elements from x on, which are the flat elements from ``element`` on; n points to their N. They are written to out,
// which may be x.
template <class T, int DRAWS, Kept KEPT, class Noise>
static inline void update_run(T *out, const T *x, float *n, int64_t element, int64_t count, const lozo_call &call,
                              int64_t tensor_id, const DenseArguments &a) {
  constexpr bool kept = KEPT != Kept::kNone;
  Noise noise = {call, tensor_id, {}};
  int64_t ready = INT64_MIN;
  // Whole blocks in the global numbering, so that the counters of a block share their high bits.
  for (int64_t j = -(element & (kBlock - 1)); j < count;) {
    if (element + j >= ready) ready = noise.template prepare<DRAWS>(element + j);
    if (j < 0 || j + kBlock > count) {
      const int64_t from = j < 0 ? -j : 0, some = (j + kBlock > count ? count - j : kBlock) - from;
      alignas(64) T block[kBlock] = {};
      alignas(64) float values[kBlock] = {};
      memcpy(block + from, x + j + from, some * sizeof(T));
      if (kept) memcpy(values + from, n + j + from, some * sizeof(float));
      update_blocks<T, DRAWS, KEPT, 1>(block, block, values, noise, element + j, a);
      memcpy(out + j + from, block + from, some * sizeof(T));
      if (KEPT == Kept::kMomentum) memcpy(n + j + from, values + from, some * sizeof(float));
      j += kBlock;
      continue;
    }
    const int64_t stop = (count < ready - element ? count : ready - element) - kBlock;
    for (; j + (kAtOnce - 1) * kBlock <= stop; j += kAtOnce * kBlock) {
      prefetch_blocks<kAtOnce>(x + j, kPageAhead);
      if (kept) prefetch_blocks<kAtOnce>(n + j, kPageAhead);
      update_blocks<T, DRAWS, KEPT, kAtOnce>(out + j, x + j, kept ? n + j : n, noise, element + j, a);
    }
    for (; j <= stop; j += kBlock) update_blocks<T, DRAWS, KEPT, 1>(out + j, x + j, kept ? n + j : n, noise, element + j, a);
  }
}

constexpr int64_t kRoundingElements = 2048;

template <class T, int DRAWS, Kept KEPT, class Noise>
static inline void update_run_stochastic(T *out, const T *x, float *n, int64_t element, int64_t count, const lozo_call &call,
                                         const lozo_tensor &tensor, const DenseArguments &a, float *scratch) {
  for (int64_t j = 0; j < count; j += kRoundingElements) {
    const int64_t some = count - j < kRoundingElements ? count - j : kRoundingElements;
    read_row(scratch, x + j, some);
    update_run<float, DRAWS, KEPT, Noise>(scratch, scratch, KEPT == Kept::kNone ? n : n + j, element + j, some, call,
                                          tensor.tensor_id, a);
    write_row_stochastic(out + j, scratch, some, element + j, rounding_key(call, tensor));
  }
}

template <class T, int DRAWS, Kept KEPT, class Noise>
static inline void update_dense_tile(const Tile &tile, const OpCall &op, float *scratch) {
  constexpr bool momentum = KEPT == Kept::kMomentum;
  const lozo_call &call = *op.call;
  DenseArguments a = {};
  a.decay = call.decay ? call.decay[tile.index] : 1.0f;
  for (int d = 0; d < DRAWS; ++d) {
    a.scales[d] = call.scales[d * op.count + tile.index];
    if (momentum) a.coefficients[d] = call.coefficients[d * op.count + tile.index];
  }
  if (momentum) a.alpha = call.alpha[tile.index], a.beta = call.beta[tile.index];
  for (int64_t i = 0; i < tile.rows; ++i) {
    const T *x = (const T *)tile.tensor->x + weight_offset(tile, i);
    T *out = (T *)tile.out->x + out_offset(tile, i);
    float *n = KEPT == Kept::kNone ? nullptr : (float *)tile.tensor->n + dense_offset(tile, i);
    if constexpr (sizeof(T) == 2) {
      if (call.rounding) {
        update_run_stochastic<T, DRAWS, KEPT, Noise>(out, x, n, global_element(tile, i), tile.cols, call, *tile.tensor, a, scratch);
        continue;
      }
    }
    update_run<T, DRAWS, KEPT, Noise>(out, x, n, global_element(tile, i), tile.cols, call, tile.tensor->tensor_id, a);
  }
}

template <int DRAWS, Kept KEPT, class Noise>
static inline void update_dense_tile(const Tile &tile, const OpCall &op, float *scratch) {
  switch (tile.tensor->dtype) {
    case LOZO_FLOAT32:
      return update_dense_tile<float, DRAWS, KEPT, Noise>(tile, op, scratch);
    case LOZO_BFLOAT16:
      return update_dense_tile<bf16, DRAWS, KEPT, Noise>(tile, op, scratch);
    default:
      return update_dense_tile<f16, DRAWS, KEPT, Noise>(tile, op, scratch);
  }
}

template <int DRAWS, Kept KEPT>
static inline void update_dense_tile(const Tile &tile, const OpCall &op, float *scratch) {
  if (DRAWS > 0 && op.call->law == LOZO_RADEMACHER) return update_dense_tile<DRAWS, KEPT, Signs>(tile, op, scratch);
  return update_dense_tile<DRAWS, KEPT, Normals>(tile, op, scratch);
}

// ``tile`` works on one tile with scratch for rounding.
static inline int update_dense(const lozo_tensor *tensors, int64_t count, const lozo_call *call,
                               void (*tile)(const Tile &, char *, const void *)) {
  const OpCall op = {call, count};
  return for_each_tile({tensors, count, call->threads, kFlatGrain, true, kRoundingElements * sizeof(float), tile, &op, call->out});
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
