// Y <- gain * Y + (X V)(B + scale * U)^T + shift, or with the weight transposed Y <- gain * Y + (X (B + scale * U)) V^T + shift.
#include "inner_products.h"
#include "ops.h"
#include "skinny.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

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
  multiply_rows(plan.p + token * rank, rank, x, s.x_stride, count, cols, panel);
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
  const InnerPlan plan = {&s, &inner, &outer, outer.panels + outer_floats, TokenChunks(s.tokens, s.groups, threads)};
  const int64_t items = outer.items() + s.groups * plan.chunks.per_group;
  if (!share_out(inner.items(), threads_for(s, inner.work()), 0, panel_item, &plan)) return LOZO_NO_MEMORY;
  if (!share_out(items, threads, 0, inner_item, &plan)) return LOZO_NO_MEMORY;
  return add_outer_products(s, outer, plan.p) ? LOZO_OK : LOZO_NO_MEMORY;
}

}  // namespace LOZO_ISA
}  // namespace lozo
