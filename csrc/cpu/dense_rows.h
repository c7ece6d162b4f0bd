// A run of flat elements: decay, then the dense noise of each draw, then what was accumulated.
#ifndef LOZO_DENSE_ROWS_H
#define LOZO_DENSE_ROWS_H

#include "lozo/abi.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {

constexpr int kAtOnce = W > 4 ? 2 : 1;  // blocks whose Philox rounds run side by side

// What happens to N besides: nothing, for there is none; it decays, is drawn into and kept, and enters times alpha (momentum); or
// it enters as it is, the noise added to it first, and is only read (merge).
enum class Kept { kNone, kMomentum, kMerged };

struct DenseArguments {
  float scales[LOZO_MAX_DRAWS], coefficients[LOZO_MAX_DRAWS];
  float alpha, beta, decay;
};

// BLOCKS times 2 W elements, whose noise starts with the counter ``quad``. Without decay the factor is 1, which changes nothing.
template <class T, int DRAWS, Kept KEPT, int BLOCKS>
LOZO_INLINE void update_blocks(T *out, const T *x, float *n, const Counters *counters, uint32_t quad, const DenseArguments &a) {
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
    flat_words<interleaved>(words, counters[d], quad);
    const F scale = splat(a.scales[d]), coefficient = splat(merged ? a.scales[d] : a.coefficients[d]);
    for (int i = 0; i < BLOCKS; ++i) {
      const Pair<F> z = {normal(words[i].a), normal(words[i].b)};
      if (!merged) y[i] = {add(y[i].a, mul(z.a, scale)), add(y[i].b, mul(z.b, scale))};
      if (momentum || merged) m[i] = {add(m[i].a, mul(z.a, coefficient)), add(m[i].b, mul(z.b, coefficient))};
    }
  }
  for (int i = 0; i < BLOCKS; ++i) {
    if (momentum) {
      y[i] = {add(y[i].a, mul(m[i].a, splat(a.alpha))), add(y[i].b, mul(m[i].b, splat(a.alpha)))};
      Io<float>::store(n + i * kBlock, interleaved ? interleave(m[i]) : m[i]);
    }
    if (merged) y[i] = {add(y[i].a, m[i].a), add(y[i].b, m[i].b)};
    Io<T>::store(out + i * kBlock, y[i]);
  }
}

// The ``count`` elements from x, which are the flat elements from ``element``; n is what is kept of them. They are written to out,
// which may be x.
template <class T, int DRAWS, Kept KEPT>
static inline void update_run(T *out, const T *x, float *n, int64_t element, int64_t count, const lozo_call &call,
                              int64_t tensor_id, const DenseArguments &a) {
  constexpr bool kept = KEPT != Kept::kNone;
  Counters counters[LOZO_MAX_DRAWS];
  int64_t high_bits = -1;
  // Whole blocks of the global numbering, so that a block's counters share their high bits.
  for (int64_t j = -(element & (kBlock - 1)); j < count;) {
    const int64_t quad = (element + j) >> 2;
    if (quad >> 32 != high_bits) {
      high_bits = quad >> 32;
      for (int d = 0; d < DRAWS; ++d)
        counters[d] = make_counters(call.seed, direction_word(high_bits, call.directions[d]), (uint32_t)tensor_id,
                                    draw_word(kStreamZ, call.draw_steps[d]));
    }
    if (j < 0 || j + kBlock > count) {
      const int64_t from = j < 0 ? -j : 0, some = (j + kBlock > count ? count - j : kBlock) - from;
      alignas(64) T block[kBlock] = {};
      alignas(64) float values[kBlock] = {};
      memcpy(block + from, x + j + from, some * sizeof(T));
      if (kept) memcpy(values + from, n + j + from, some * sizeof(float));
      update_blocks<T, DRAWS, KEPT, 1>(block, block, values, counters, (uint32_t)quad, a);
      memcpy(out + j + from, block + from, some * sizeof(T));
      if (KEPT == Kept::kMomentum) memcpy(n + j + from, values + from, some * sizeof(float));
      j += kBlock;
      continue;
    }
    const int64_t until_carry = (((high_bits + 1) << 32) - quad) * 4;
    const int64_t stop = count - j < until_carry ? count - kBlock : j + until_carry - kBlock;
    uint32_t next = (uint32_t)quad;
    for (; j + (kAtOnce - 1) * kBlock <= stop; j += kAtOnce * kBlock, next += kAtOnce * kCounters)
      update_blocks<T, DRAWS, KEPT, kAtOnce>(out + j, x + j, kept ? n + j : n, counters, next, a);
    for (; j <= stop; j += kBlock, next += kCounters)
      update_blocks<T, DRAWS, KEPT, 1>(out + j, x + j, kept ? n + j : n, counters, next, a);
  }
}

constexpr int64_t kRoundingElements = 2048;

template <class T, int DRAWS, Kept KEPT>
static inline void update_run_stochastic(T *out, const T *x, float *n, int64_t element, int64_t count, const lozo_call &call,
                                         const lozo_tensor &tensor, const DenseArguments &a, float *scratch) {
  for (int64_t j = 0; j < count; j += kRoundingElements) {
    const int64_t some = count - j < kRoundingElements ? count - j : kRoundingElements;
    read_row(scratch, x + j, some);
    update_run<float, DRAWS, KEPT>(scratch, scratch, KEPT == Kept::kNone ? n : n + j, element + j, some, call, tensor.tensor_id, a);
    write_row_stochastic(out + j, scratch, some, element + j, rounding_key(call, tensor));
  }
}

template <class T, int DRAWS, Kept KEPT>
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
        update_run_stochastic<T, DRAWS, KEPT>(out, x, n, global_element(tile, i), tile.cols, call, *tile.tensor, a, scratch);
        continue;
      }
    }
    update_run<T, DRAWS, KEPT>(out, x, n, global_element(tile, i), tile.cols, call, tile.tensor->tensor_id, a);
  }
}

template <int DRAWS, Kept KEPT>
static inline void update_dense_tile(const Tile &tile, const OpCall &op, float *scratch) {
  switch (tile.tensor->dtype) {
    case LOZO_FLOAT32:
      return update_dense_tile<float, DRAWS, KEPT>(tile, op, scratch);
    case LOZO_BFLOAT16:
      return update_dense_tile<bf16, DRAWS, KEPT>(tile, op, scratch);
    default:
      return update_dense_tile<f16, DRAWS, KEPT>(tile, op, scratch);
  }
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
