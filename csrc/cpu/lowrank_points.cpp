// Y[t] <- gain * Y[t] + (X[t] V) B^T + scale[t] * (X[t] V_r) U[direction[t]]^T, where V_r is the first r columns of V, or with the
// weight transposed Y[t] <- gain * Y[t] + (X[t] B + scale[t] * X[t] U[direction[t]]) V^T. All factors are given by ranks: a rank is
// a contiguous row, so panels are made of them without a transposition.
#include "inner_products.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

// The side that is summed over (V, or B and U if transposed) has panels that all threads share. A work item makes those of the
// other side for its own columns.
struct Plan {
  const lozo_points *call;
  const float *inner, *outer;  // V and B, or B and V: (ranks, inner_cols) and (ranks, outer_cols)
  int64_t inner_cols, outer_cols;
  float *panel;  // of inner
  float *along;  // panels of the directions, if they are summed over, else NULL
  int64_t size;  // of each of them, in floats
  float *p;      // (tokens, ranks)
  TokenChunks chunks;
  int64_t across;  // items side by side in the outer product

  const float *direction(int64_t number) const { return call->u + number * call->rank * call->rows; }
};

void panel_item(int64_t number, char *, const void *context) {
  const Plan &plan = *(const Plan *)context;
  const lozo_points &s = *plan.call;
  const int64_t col = number * kPanelCols, cols = at_most(kPanelCols, plan.inner_cols - col);
  const bool interleaved = s.x_dtype == LOZO_BFLOAT16;
  build_float_panel(plan.panel + col * s.ranks, interleaved, plan.inner + col, plan.inner_cols, (int)s.ranks, cols);
  if (!plan.along) return;
  for (int64_t d = 0; d < s.count; ++d)
    build_float_panel(plan.along + d * plan.size + col * s.rank, interleaved, plan.direction(d) + col, s.rows, (int)s.rank, cols);
}

template <class T>
void inner_products(const Plan &plan, int64_t number) {
  const lozo_points &s = *plan.call;
  const int64_t first = plan.chunks.first(number), count = plan.chunks.count(number);
  const T *x = (const T *)s.x + first * s.x_stride;
  float *p = plan.p + first * s.ranks;
  multiply_rows(p, (int)s.ranks, x, s.x_stride, count, plan.inner_cols, plan.panel);
  if (!plan.along) return;
  for (int64_t t = 0; t < count; ++t, x += s.x_stride, p += s.ranks) {
    const float scale = s.scales[first + t];
    if (scale == 0) continue;
    float sums[LOZO_MAX_RANK];
    const float *panel = plan.along + s.directions[first + t] * plan.size;
    multiply_tokens<T, 1>(sums, (int)s.rank, x, s.x_stride, plan.inner_cols, panel);
    for (int k = 0; k < s.rank; ++k) p[k] += scale * sums[k];
  }
}

void inner_item(int64_t number, char *, const void *context) {
  const Plan &plan = *(const Plan *)context;
  switch (plan.call->x_dtype) {
    case LOZO_FLOAT32:
      return inner_products<float>(plan, number);
    case LOZO_BFLOAT16:
      return inner_products<bf16>(plan, number);
    default:
      return inner_products<f16>(plan, number);
  }
}

// What some tokens multiply with: P and the panel that they share, and each token's own direction, NULL at rest.
template <int TOKENS>
struct Terms {
  const float *p, *panel;
  const float *own[TOKENS];
  float q[TOKENS][LOZO_MAX_RANK];
};

template <class T, bool GAIN, int TOKENS>
LOZO_INLINE void add_terms(T *y, int64_t stride, int64_t count, const Terms<TOKENS> &terms, int64_t block, int64_t ranks,
                           int64_t rank, F gain) {
  Pair<F> sum[TOKENS];
  load_rows<T, TOKENS, GAIN>(sum, y, stride, count, gain);
  const auto add_product = [&](int t, float a, Pair<F> c) {
    sum[t] = {multiply_add(splat(a), c.a, sum[t].a), multiply_add(splat(a), c.b, sum[t].b)};
  };
  const float *panel = terms.panel + block * ranks * kBlock;
  for (int64_t k = 0; k < ranks; ++k) {
    const Pair<F> c = Io<float>::load(panel + k * kBlock);
    for (int t = 0; t < TOKENS; ++t) add_product(t, terms.p[t * ranks + k], c);
  }
  for (int t = 0; t < TOKENS; ++t) {
    if (!terms.own[t]) continue;
    const float *own = terms.own[t] + block * rank * kBlock;
    for (int64_t k = 0; k < rank; ++k) add_product(t, terms.q[t][k], Io<float>::load(own + k * kBlock));
  }
  store_rows<T, TOKENS, true>(y, stride, sum, count);
}

// The panels of an item's columns, in a thread's scratch memory; those of a direction are made when a token needs them.
struct Panels {
  const Plan &plan;
  int64_t col, cols;
  bool interleaved;
  float *shared, *own;  // panels of the directions lie rank * kPanelCols floats apart
  char *made;

  Panels(const Plan &p, int64_t number, char *scratch) : plan(p) {
    const lozo_points &s = *p.call;
    col = number * kPanelCols;
    cols = at_most(kPanelCols, p.outer_cols - col);
    interleaved = s.y_dtype == LOZO_BFLOAT16;
    shared = (float *)scratch;
    own = shared + s.ranks * kPanelCols;
    made = (char *)(own + (points() ? s.count * s.rank * kPanelCols : 0));
    build_float_panel(shared, interleaved, p.outer + col, p.outer_cols, (int)s.ranks, cols);
    if (points()) memset(made, 0, s.count);
  }

  bool points() const { return plan.call->u && !plan.along; }

  const float *of(int64_t direction) {
    const int64_t rank = plan.call->rank;
    float *panel = own + direction * rank * kPanelCols;
    if (!made[direction]) build_float_panel(panel, interleaved, plan.direction(direction) + col, plan.outer_cols, (int)rank, cols);
    made[direction] = 1;
    return panel;
  }
};

template <class T, bool GAIN, int TOKENS>
void add_to_tokens(Panels &panels, int64_t token) {
  const lozo_points &s = *panels.plan.call;
  Terms<TOKENS> terms = {panels.plan.p + token * s.ranks, panels.shared, {}, {}};
  for (int t = 0; panels.points() && t < TOKENS; ++t) {
    const float scale = s.scales[token + t];
    if (scale == 0) continue;
    terms.own[t] = panels.of(s.directions[token + t]);
    for (int64_t k = 0; k < s.rank; ++k) terms.q[t][k] = scale * terms.p[t * s.ranks + k];
  }
  T *y = (T *)s.y + token * s.y_stride + panels.col;
  const F gain = splat(GAIN ? *s.gain : 1.0f);
  int64_t j = 0, block = 0;
  for (; j + kBlock <= panels.cols; j += kBlock, ++block)
    add_terms<T, GAIN, TOKENS>(y + j, s.y_stride, kBlock, terms, block, s.ranks, s.rank, gain);
  if (j < panels.cols) add_terms<T, GAIN, TOKENS>(y + j, s.y_stride, panels.cols - j, terms, block, s.ranks, s.rank, gain);
}

template <class T, bool GAIN>
void outer_products(const Plan &plan, int64_t number, char *scratch) {
  const int64_t chunk = number / plan.across;
  int64_t token = plan.chunks.first(chunk);
  const int64_t end = token + plan.chunks.count(chunk);
  Panels panels(plan, number % plan.across, scratch);
  for (; token + kTokensAtOnce <= end; token += kTokensAtOnce) add_to_tokens<T, GAIN, kTokensAtOnce>(panels, token);
  for (; token < end; ++token) add_to_tokens<T, GAIN, 1>(panels, token);
}

template <class T>
void outer_products(const Plan &plan, int64_t number, char *scratch) {
  return plan.call->gain ? outer_products<T, true>(plan, number, scratch) : outer_products<T, false>(plan, number, scratch);
}

void columns_item(int64_t number, char *scratch, const void *context) {
  const Plan &plan = *(const Plan *)context;
  switch (plan.call->y_dtype) {
    case LOZO_FLOAT32:
      return outer_products<float>(plan, number, scratch);
    case LOZO_BFLOAT16:
      return outer_products<bf16>(plan, number, scratch);
    default:
      return outer_products<f16>(plan, number, scratch);
  }
}

}  // namespace

int lowrank_points(const lozo_points *call) {
  const lozo_points &s = *call;
  const bool summed = s.transposed && s.u;
  const int64_t inner_cols = s.transposed ? s.rows : s.cols, outer_cols = s.transposed ? s.cols : s.rows;
  if (s.tokens == 0 || outer_cols == 0) return LOZO_OK;
  const int64_t width = divide_up(inner_cols, kBlock) * kBlock, size = width * s.rank;
  const int64_t panels = width * s.ranks + (summed ? s.count * size : 0);
  float *floats = (float *)shared_scratch((panels + s.tokens * s.ranks) * sizeof(float));
  if (!floats) return LOZO_NO_MEMORY;

  int64_t threads = threads_for(s, s.tokens * width * s.ranks);
  Plan plan = {&s,
               s.transposed ? s.b : s.v,
               s.transposed ? s.v : s.b,
               inner_cols,
               outer_cols,
               floats,
               nullptr,
               size,
               floats + panels,
               TokenChunks(s.tokens, 1, threads),
               divide_up(outer_cols, kPanelCols)};
  if (summed) plan.along = floats + width * s.ranks;
  if (!share_out(divide_up(inner_cols, kPanelCols), threads_for(s, panels), 0, panel_item, &plan)) return LOZO_NO_MEMORY;
  if (!share_out(plan.chunks.per_group, threads, 0, inner_item, &plan)) return LOZO_NO_MEMORY;

  const bool own = s.u && !summed;
  const size_t scratch = (s.ranks + (own ? s.count * s.rank : 0)) * kPanelCols * sizeof(float) + (own ? s.count : 0);
  threads = threads_for(s, s.tokens * outer_cols * (s.ranks + 2));
  plan.chunks = TokenChunks(s.tokens, 1, divide_up(threads, plan.across));
  return share_out(plan.across * plan.chunks.per_group, threads, scratch, columns_item, &plan) ? LOZO_OK : LOZO_NO_MEMORY;
}

}  // namespace LOZO_ISA
}  // namespace lozo
