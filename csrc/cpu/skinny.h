// Products of activations with the factors of a weight, in three steps, each shared out among the threads: a panel of one factor;
// P, the product of the activations with it, and beside it a panel of the other factor; then Y <- gain * Y + P panel + shift.
// The bits are not promised, but no sum depends on the number of threads.
#ifndef LOZO_SKINNY_H
#define LOZO_SKINNY_H

#include "lowrank_rows.h"
#include "noise_vec.h"
#include "panel.h"
#include "threads.h"

namespace lozo {
namespace LOZO_ISA {

constexpr int kTokensAtOnce = kRegisters == 32 ? 4 : 2;  // tokens that share a panel's registers
constexpr int64_t kPanelCols = 128;                      // columns that one item of work makes
constexpr int64_t kItemsPerThread = 4;
constexpr int64_t kWorkPerThread = 1 << 18;  // multiply-adds; with fewer, waking a thread costs more than it saves
constexpr int64_t kNoiseWork = 48;           // multiply-adds in the time that a value of U takes
constexpr int64_t kResidentBytes = 1 << 17;  // bytes of a panel that stay in the second-level cache while tokens pass

LOZO_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
LOZO_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Call>
LOZO_INLINE int64_t threads_for(const Call &s, int64_t work) {
  return at_most(s.threads, 1 + work / kWorkPerThread);
}

// The tokens of every group in equal pieces, as many as let all threads end together.
struct TokenChunks {
  int64_t group, chunk, per_group;  // tokens, tokens, chunks
  TokenChunks(int64_t tokens, int64_t groups, int64_t threads) {
    group = tokens / groups;
    const int64_t least = divide_up(threads > 1 ? threads * kItemsPerThread : 1, groups);
    chunk = divide_up(divide_up(group, least), kTokensAtOnce) * kTokensAtOnce;
    per_group = chunk ? divide_up(group, chunk) : 0;
  }
  int64_t first(int64_t number) const { return number / per_group * group + number % per_group * chunk; }
  int64_t count(int64_t number) const { return at_most(chunk, group - number % per_group * chunk); }
};

// R vectors of W rows by R columns become R vectors of one column each.
template <int R>
LOZO_INLINE void transpose(F *x) {
  if constexpr (R > 1) {
    F even[R / 2], odd[R / 2];
    for (int i = 0; i < R / 2; ++i) {
      const Pair<F> y = deinterleave(Pair<F>{x[2 * i], x[2 * i + 1]});
      even[i] = y.a, odd[i] = y.b;
    }
    transpose<R / 2>(even);
    transpose<R / 2>(odd);
    for (int i = 0; i < R / 2; ++i) x[2 * i] = even[i], x[2 * i + 1] = odd[i];
  }
}

// A block of columns of B^T; RANK = 0 serves any rank.
template <int RANK>
LOZO_INLINE void transpose_block(float *panel, bool interleaved, const float *b, int any_rank) {
  const int rank = RANK ? RANK : any_rank;
  if constexpr (RANK > 0) {
    F first[RANK], last[RANK];
    for (int k = 0; k < RANK; ++k) first[k] = load(b + k * W), last[k] = load(b + (RANK + k) * W);
    transpose<RANK>(first);
    transpose<RANK>(last);
    for (int k = 0; k < RANK; ++k) Io<float>::store(panel + k * kBlock, {first[k], last[k]});
  } else {
    for (int k = 0; k < rank; ++k)
      for (int i = 0; i < kBlock; ++i) panel[k * kBlock + i] = b[i * rank + k];
  }
  if (interleaved)
    for (int k = 0; k < rank; ++k, panel += kBlock) Io<float>::store(panel, deinterleave(Io<float>::load(panel)));
}

template <int RANK>
static void transpose_factor(float *panel, bool interleaved, const float *b, int64_t rows, int rank) {
  const int64_t whole = rows / kBlock * kBlock;
  for (int64_t i = 0; i < whole; i += kBlock, b += kBlock * rank, panel += kBlock * rank)
    transpose_block<RANK>(panel, interleaved, b, rank);
  if (whole == rows) return;
  float rest[LOZO_MAX_RANK * kBlock];
  memset(rest, 0, kBlock * rank * sizeof(float));
  memcpy(rest, b, (rows - whole) * rank * sizeof(float));
  transpose_block<RANK>(panel, interleaved, rest, rank);
}

// Counters of the rows of a block whose words interleave to vectors of the panel: even and odd lanes of a, and of b.
template <bool INTERLEAVED>
LOZO_INLINE void block_counters(L (&a)[2], L (&b)[2], uint32_t row) {
  if constexpr (INTERLEAVED) {
    a[0] = spaced_counters<4>(row), a[1] = spaced_counters<4>(row + 2);
    b[0] = spaced_counters<4>(row + 1), b[1] = spaced_counters<4>(row + 3);
  } else {
    a[0] = spaced_counters<2>(row), a[1] = spaced_counters<2>(row + 1);
    b[0] = spaced_counters<2>(row + W), b[1] = spaced_counters<2>(row + W + 1);
  }
}

// Adds scale * U to the panels of some evaluations along one direction, which lie ``stride`` floats apart.
template <bool INTERLEAVED>
static void add_noise(float *panel, int64_t stride, uint32_t row, int64_t rows, int rank, int group, const Counters &counters,
                      const float *scales, int64_t evaluations) {
  const int ranks = (int)at_most(4, rank - 4 * group);
  const F unit = splat(kGridStep);
  panel += 4 * group * kBlock;
  for (int64_t i = 0; i < rows; i += kBlock, panel += rank * kBlock) {
    L c0[2][2];
    Words x[2][2];
    block_counters<INTERLEAVED>(c0[0], c0[1], row + (uint32_t)i);
    for (int half = 0; half < 2; ++half) philox(x[half], counters, c0[half]);
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < ranks; ++k) {
        float *c = panel + k * kBlock + half * W;
        const F u = mul(to_float(normal_steps(zip(x[half][0].w[k], x[half][1].w[k]))), unit);
        for (int64_t e = 0; e < evaluations; ++e, c += stride) store(c, add(load(c), mul(u, splat(scales[e]))));
      }
  }
}

// B + scale * U for ``rows`` rows from ``row`` on, for evaluations with one draw.
static inline void build_factor_panels(float *panel, int64_t stride, bool interleaved, const lozo_skinny &s, int64_t first,
                                       int64_t evaluations, int64_t row, int64_t rows) {
  const int rank = (int)s.rank;
  const auto transposed = rank == 1   ? transpose_factor<1>
                          : rank == 2 ? transpose_factor<2>
                          : rank == 4 ? transpose_factor<4>
                          : rank == 8 ? transpose_factor<8>
                                      : transpose_factor<0>;
  transposed(panel, interleaved, s.b + row * rank, rows, rank);
  const int64_t floats = divide_up(rows, kBlock) * kBlock * rank;
  for (int64_t e = 1; e < evaluations; ++e) memcpy(panel + e * stride, panel, floats * sizeof(float));
  const float *scales = s.scales + first;
  if (evaluations == 1 && scales[0] == 0) return;
  const auto add = interleaved ? add_noise<true> : add_noise<false>;
  const int64_t step = s.draws[2 * first], direction = s.draws[2 * first + 1];
  for (int group = 0; group * 4 < rank; ++group) {
    const Counters counters =
        make_counters(s.seed, direction_word(group, direction), (uint32_t)s.tensor_id, draw_word(kStreamU, step));
    add(panel, stride, (uint32_t)(s.row_offset + row), rows, rank, group, counters, scales, evaluations);
  }
}

// The evaluations from ``first`` on that have the same draw as it.
LOZO_INLINE int64_t count_of_draw(const lozo_skinny &s, int64_t first) {
  const int64_t *draws = s.draws + 2 * first;
  int64_t count = 1;
  while (first + count < s.groups && draws[2 * count] == draws[0] && draws[2 * count + 1] == draws[1]) ++count;
  return count;
}

// A factor as the panel of one side of a product: V, which is the same for all evaluations, or B + scale * U.
struct PanelPlan {
  bool drawn;        // the factor is B + scale * U
  bool interleaved;  // the order of the activations on this side
  int64_t cols;
  float *panels;
  int64_t size;  // of one panel, in floats
  int64_t count;

  int64_t across() const { return divide_up(cols, kPanelCols); }
  int64_t items() const { return across(); }
  int64_t work() const { return count * size * (drawn ? kNoiseWork : 1); }
  const float *of(int64_t evaluation) const { return panels + (count > 1 ? evaluation * size : 0); }
};

static inline PanelPlan plan_panel(const lozo_skinny &s, bool drawn, int64_t dtype) {
  PanelPlan plan;
  plan.drawn = drawn;
  plan.interleaved = dtype == LOZO_BFLOAT16;
  plan.cols = drawn ? s.rows : s.cols;
  plan.panels = nullptr;
  plan.size = divide_up(plan.cols, kBlock) * kBlock * s.rank;
  plan.count = drawn ? s.groups : 1;
  return plan;
}

// Makes some columns of the panels of all evaluations.
static inline void build_panel_item(const PanelPlan &plan, const lozo_skinny &s, int64_t number) {
  const int64_t col = number * kPanelCols, cols = at_most(kPanelCols, plan.cols - col);
  float *panel = plan.panels + col * s.rank;
  if (!plan.drawn) return build_float_panel(panel, plan.interleaved, (const f16 *)s.v + col, s.cols, (int)s.rank, cols);
  for (int64_t first = 0, count; first < s.groups; first += count) {
    count = count_of_draw(s, first);
    build_factor_panels(panel + first * plan.size, plan.size, plan.interleaved, s, first, count, col, cols);
  }
}

// The third step: Y <- gain * Y + P panel + shift, with P (tokens, rank). Returns false if there is no memory. It is compiled once
// (outer_products.cpp), for both products.
bool add_outer_products(const lozo_skinny &s, const PanelPlan &panel, const float *p);

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
