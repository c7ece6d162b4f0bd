// Y <- gain * Y + (X V)(B + scale * U)^T + shift, or with the weight transposed Y <- gain * Y + (X (B + scale * U)) V^T + shift.
#include "ops.h"
#include "skinny.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

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
void multiply_tokens(float *p, int rank, const T *x, int64_t stride, int64_t cols, const float *panel) {
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

struct InnerPlan {
  const lozo_skinny *call;
  const PanelPlan *inner, *outer;
  float *p;  // (tokens, rank)
  TokenChunks chunks;
};

template <class T>
void multiply_chunk(const InnerPlan &plan, int64_t number) {
  const lozo_skinny &s = *plan.call;
  const int64_t token = plan.chunks.first(number), count = plan.chunks.count(number), cols = plan.inner->cols;
  const int rank = (int)s.rank;
  const float *panel = plan.inner->of(number / plan.chunks.per_group);
  const T *x = (const T *)s.x + token * s.x_stride;
  float *p = plan.p + token * rank;
  int64_t t = 0;
  for (; t + kTokensAtOnce <= count; t += kTokensAtOnce)
    multiply_tokens<T, kTokensAtOnce>(p + t * rank, rank, x + t * s.x_stride, s.x_stride, cols, panel);
  for (; t < count; ++t) multiply_tokens<T, 1>(p + t * rank, rank, x + t * s.x_stride, s.x_stride, cols, panel);
}

// The panel of the outer product comes first, because its items take longer.
void inner_item(int64_t number, char *, const void *context) {
  const InnerPlan &plan = *(const InnerPlan *)context;
  if (number < plan.outer->items()) return build_panel_item(*plan.outer, *plan.call, number);
  number -= plan.outer->items();
  switch (plan.call->x_dtype) {
    case LOZO_FLOAT32:
      return multiply_chunk<float>(plan, number);
    case LOZO_BFLOAT16:
      return multiply_chunk<bf16>(plan, number);
    default:
      return multiply_chunk<f16>(plan, number);
  }
}

void panel_item(int64_t number, char *, const void *context) {
  const InnerPlan &plan = *(const InnerPlan *)context;
  build_panel_item(*plan.inner, *plan.call, number);
}

}  // namespace

int lowrank_linear(const lozo_skinny *call) {
  const lozo_skinny &s = *call;
  PanelPlan inner = plan_panel(s, s.transposed != 0, s.x_dtype), outer = plan_panel(s, s.transposed == 0, s.y_dtype);
  if (s.tokens == 0 || outer.cols == 0) return LOZO_OK;
  const int64_t inner_floats = inner.count * inner.size, outer_floats = outer.count * outer.size;
  float *floats = (float *)shared_scratch((inner_floats + outer_floats + s.tokens * s.rank) * sizeof(float));
  if (!floats) return LOZO_NO_MEMORY;
  inner.panels = floats;
  outer.panels = floats + inner_floats;
  const int64_t threads = threads_for(s, s.tokens * inner.size + outer.work());
  const InnerPlan plan = {&s, &inner, &outer, outer.panels + outer_floats, TokenChunks(s, threads)};
  const int64_t items = outer.items() + s.groups * plan.chunks.per_group;
  if (!share_out(inner.items(), threads_for(s, inner.work()), 0, panel_item, &plan)) return LOZO_NO_MEMORY;
  if (!share_out(items, threads, 0, inner_item, &plan)) return LOZO_NO_MEMORY;
  return add_outer_products(s, outer, plan.p) ? LOZO_OK : LOZO_NO_MEMORY;
}

}  // namespace LOZO_ISA
}  // namespace lozo
