// P, the sums of products of activations with the ranks of a panel.
#ifndef LOZO_INNER_PRODUCTS_H
#define LOZO_INNER_PRODUCTS_H

#include "skinny.h"

namespace lozo {
namespace LOZO_ISA {

constexpr int kRanksAtOnce = kRegisters == 32 ? 4 : 2;  // ranks whose sums stay in registers

// RANKS sums over the columns for each of some tokens.
template <class T, int RANKS, int TOKENS>
LOZO_INLINE void multiply_ranks(float *p, int rank, const T *x, int64_t stride, int64_t cols, const float *panel) {
  F sum[TOKENS][RANKS];
  for (int t = 0; t < TOKENS; ++t)
    for (int k = 0; k < RANKS; ++k) sum[t][k] = splat(0);
  const auto add_block = [&](int64_t j, int64_t count) {
    Pair<F> y[TOKENS];
    load_rows<T, TOKENS, false>(y, x + j, stride, count, splat(1));
    for (int k = 0; k < RANKS; ++k) {
      const Pair<F> v = {load(panel + k * kBlock), load(panel + k * kBlock + W)};
      for (int t = 0; t < TOKENS; ++t) sum[t][k] = multiply_add(y[t].b, v.b, multiply_add(y[t].a, v.a, sum[t][k]));
    }
    panel += rank * kBlock;
  };
  int64_t j = 0;
  for (; j + kBlock <= cols; j += kBlock) add_block(j, kBlock);
  if (j < cols) add_block(j, cols - j);
  for (int t = 0; t < TOKENS; ++t)
    for (int k = 0; k < RANKS; ++k) p[t * rank + k] = sum_lanes(sum[t][k]);
}

template <class T, int TOKENS>
static void multiply_tokens(float *p, int rank, const T *x, int64_t stride, int64_t cols, const float *panel) {
  int k = 0;
  for (; k + kRanksAtOnce <= rank; k += kRanksAtOnce)
    multiply_ranks<T, kRanksAtOnce, TOKENS>(p + k, rank, x, stride, cols, panel + k * kBlock);
  p += k, panel += k * kBlock;
  switch (rank - k) {
    case 1:
      return multiply_ranks<T, 1, TOKENS>(p, rank, x, stride, cols, panel);
    case 2:
      return multiply_ranks<T, 2, TOKENS>(p, rank, x, stride, cols, panel);
    case 3:
      return multiply_ranks<T, 3, TOKENS>(p, rank, x, stride, cols, panel);
    default:
      return;
  }
}

// p <- X panel of some tokens, (tokens, rank).
template <class T>
static void multiply_rows(float *p, int rank, const T *x, int64_t stride, int64_t tokens, int64_t cols, const float *panel) {
  int64_t t = 0;
  for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce)
    multiply_tokens<T, kTokensAtOnce>(p + t * rank, rank, x + t * stride, stride, cols, panel);
  for (; t < tokens; ++t) multiply_tokens<T, 1>(p + t * rank, rank, x + t * stride, stride, cols, panel);
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
