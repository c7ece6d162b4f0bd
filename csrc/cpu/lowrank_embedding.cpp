// Y <- gain * Y + ((B + scale * U) V^T)[rows].
#include "ops.h"
#include "skinny.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int64_t kTokens = 64;  // tokens whose rows of B + scale * U are in scratch at once

struct Scratch {
  uint32_t rows[kTokens];
  float u[LOZO_MAX_RANK * kTokens];
};

int64_t row_of(const lozo_skinny &s, int64_t token) {
  return s.x_dtype == 8 ? ((const int64_t *)s.x)[token] : ((const int32_t *)s.x)[token];
}

bool rows_exist(const lozo_skinny &s) {
  for (int64_t t = 0; t < s.tokens; ++t)
    if ((uint64_t)row_of(s, t) >= (uint64_t)s.rows) return false;
  return true;
}

struct LookupPlan {
  const lozo_skinny *call;
  const PanelPlan *panel;
  float *p;           // (tokens, rank): B + scale * U of the rows that are looked up
  int64_t per_group;  // pieces of kTokens tokens in a group
};

void look_up(const LookupPlan &plan, int64_t number, Scratch *scratch) {
  const lozo_skinny &s = *plan.call;
  const int64_t size = s.tokens / s.groups, evaluation = number / plan.per_group, start = number % plan.per_group * kTokens;
  const int64_t first = evaluation * size + start, count = at_most(kTokens, size - start);
  const int rank = (int)s.rank;
  const float scale = s.scales[evaluation];
  float *p = plan.p + first * rank;
  for (int64_t t = 0; t < count; ++t) memcpy(p + t * rank, s.b + row_of(s, first + t) * rank, rank * sizeof(float));
  if (scale == 0) return;
  const int64_t stride = divide_up(rank, 4) * 4;
  uint32_t *rows = scratch->rows;
  for (int64_t t = 0; t < kTokens; ++t) rows[t] = t < count ? (uint32_t)(s.row_offset + row_of(s, first + t)) : 0;
  factor_floats(scratch->u, stride, s.seed, s.draws[2 * evaluation], s.draws[2 * evaluation + 1], s.tensor_id, count, rank,
                [rows](int64_t i) { return load_counters(rows + i); });
  for (int64_t t = 0; t < count; ++t)
    for (int k = 0; k < rank; ++k) p[t * rank + k] += scratch->u[t * stride + k] * scale;
}

void look_up_item(int64_t number, char *scratch, const void *context) {
  const LookupPlan &plan = *(const LookupPlan *)context;
  if (number < plan.panel->items()) return build_panel_item(*plan.panel, *plan.call, number);
  look_up(plan, number - plan.panel->items(), (Scratch *)scratch);
}

}  // namespace

int lowrank_embedding(const lozo_skinny *call) {
  const lozo_skinny &s = *call;
  PanelPlan panel = plan_panel(s, false, s.y_dtype);
  if (s.tokens == 0 || panel.cols == 0) return LOZO_OK;
  if (!rows_exist(s)) return LOZO_BAD_ARGUMENT;
  panel.panels = (float *)shared_scratch((panel.size + s.tokens * s.rank) * sizeof(float));
  if (!panel.panels) return LOZO_NO_MEMORY;
  const LookupPlan plan = {&s, &panel, panel.panels + panel.size, divide_up(s.tokens / s.groups, kTokens)};
  const int64_t items = panel.items() + s.groups * plan.per_group;
  const int64_t threads = threads_for(s, panel.work() + s.tokens * s.rank * kNoiseWork);
  if (!share_out(items, threads, sizeof(Scratch), look_up_item, &plan)) return LOZO_NO_MEMORY;
  return add_outer_products(s, panel, plan.p) ? LOZO_OK : LOZO_NO_MEMORY;
}

}  // namespace LOZO_ISA
}  // namespace lozo
