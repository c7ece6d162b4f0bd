// Y <- gain * Y + P panel + shift: the last step of both products of activations.
#include "skinny.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

template <class T, int RANK, bool GAIN, int TOKENS>
LOZO_INLINE void add_block(T *y, int64_t stride, int64_t count, const F *held, const float *p, const float *panel, int any_rank,
                           F gain, Pair<F> shift) {
  const int rank = RANK ? RANK : any_rank;
  Pair<F> sum[TOKENS];
  load_rows<T, TOKENS, GAIN>(sum, y, stride, count, gain);
  for (int t = 0; t < TOKENS; ++t) sum[t] = {add(sum[t].a, shift.a), add(sum[t].b, shift.b)};
  for (int k = 0; k < rank; ++k) {
    const Pair<F> c = {load(panel + k * kBlock), load(panel + k * kBlock + W)};
    for (int t = 0; t < TOKENS; ++t) {
      const F a = RANK ? held[t * RANK + k] : splat(p[t * rank + k]);
      sum[t] = {multiply_add(a, c.a, sum[t].a), multiply_add(a, c.b, sum[t].b)};
    }
  }
  store_rows<T, TOKENS, true>(y, stride, sum, count);
}

template <class T>
LOZO_INLINE Pair<F> load_shift(const float *shift, int64_t count) {
  if (!shift) return {splat(0), splat(0)};
  const Pair<F> x = count >= kBlock ? Io<float>::load(shift) : load_partial(shift, count);
  return Io<T>::interleaved ? deinterleave(x) : x;
}

// Makes some tokens by some columns of the outputs. RANK = 0 serves any rank.
template <class T, int RANK, bool GAIN, int TOKENS>
LOZO_INLINE void add_tokens(T *y, int64_t stride, int64_t cols, const float *p, const float *panel, int rank, F gain,
                            const float *shift) {
  F held[RANK ? RANK * TOKENS : 1];
  for (int i = 0; i < RANK * TOKENS; ++i) held[i] = splat(p[i]);
  for (int64_t j = 0; j < cols; j += kBlock, panel += rank * kBlock) {
    const Pair<F> added = load_shift<T>(shift ? shift + j : shift, cols - j);
    if (cols - j >= kBlock) {
      add_block<T, RANK, GAIN, TOKENS>(y + j, stride, kBlock, held, p, panel, rank, gain, added);
    } else {
      add_block<T, RANK, GAIN, TOKENS>(y + j, stride, cols - j, held, p, panel, rank, gain, added);
    }
  }
}

template <class T, int RANK, bool GAIN>
void add_outer(T *y, int64_t stride, int64_t tokens, int64_t cols, const float *p, const float *panel, int rank, float gain,
               const float *shift) {
  int64_t t = 0;
  for (; t + kTokensAtOnce <= tokens; t += kTokensAtOnce)
    add_tokens<T, RANK, GAIN, kTokensAtOnce>(y + t * stride, stride, cols, p + t * rank, panel, rank, splat(gain), shift);
  for (; t < tokens; ++t) add_tokens<T, RANK, GAIN, 1>(y + t * stride, stride, cols, p + t * rank, panel, rank, splat(gain), shift);
}

template <class T, bool GAIN>
void add_outer(T *y, int64_t stride, int64_t tokens, int64_t cols, const float *p, const float *panel, int rank, float gain,
               const float *shift) {
  const auto add = rank == 1   ? add_outer<T, 1, GAIN>
                   : rank == 2 ? add_outer<T, 2, GAIN>
                   : rank == 3 ? add_outer<T, 3, GAIN>
                   : rank == 4 ? add_outer<T, 4, GAIN>
                               : add_outer<T, 0, GAIN>;
  add(y, stride, tokens, cols, p, panel, rank, gain, shift);
}

struct OuterPlan {
  const lozo_skinny *call;
  const PanelPlan *panel;
  const float *p;  // (tokens, rank)
  TokenChunks chunks;
  int64_t tile_cols, across;
};

template <class T>
void add_item(const OuterPlan &plan, int64_t number) {
  const lozo_skinny &s = *plan.call;
  const int64_t chunk = number / plan.across, col = number % plan.across * plan.tile_cols;
  const int64_t evaluation = chunk / plan.chunks.per_group, token = plan.chunks.first(chunk), cols = plan.panel->cols;
  const auto add = s.gain ? add_outer<T, true> : add_outer<T, false>;
  add((T *)s.y + token * s.y_stride + col, s.y_stride, plan.chunks.count(chunk), at_most(plan.tile_cols, cols - col),
      plan.p + token * s.rank, plan.panel->of(evaluation) + col * s.rank, (int)s.rank, s.gain ? *s.gain : 1.0f,
      s.shift ? s.shift + evaluation * cols + col : nullptr);
}

void outer_item(int64_t number, char *, const void *context) {
  const OuterPlan &plan = *(const OuterPlan *)context;
  switch (plan.call->y_dtype) {
    case LOZO_FLOAT32:
      return add_item<float>(plan, number);
    case LOZO_BFLOAT16:
      return add_item<bf16>(plan, number);
    default:
      return add_item<f16>(plan, number);
  }
}

}  // namespace

bool add_outer_products(const lozo_skinny &s, const PanelPlan &panel, const float *p) {
  const int64_t threads = threads_for(s, s.tokens * panel.cols * (s.rank + 2));
  const int64_t resident = kResidentBytes / 4 / s.rank / kBlock * kBlock;
  OuterPlan plan = {&s, &panel, p, TokenChunks(s.tokens, s.groups, threads), resident, 0};
  plan.across = divide_up(panel.cols, plan.tile_cols);
  return share_out(s.groups * plan.chunks.per_group * plan.across, threads, 0, outer_item, &plan);
}

}  // namespace LOZO_ISA
}  // namespace lozo
