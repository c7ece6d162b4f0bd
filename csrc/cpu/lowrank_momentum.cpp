// N <- beta * N + sum of coefficient * U, then X <- decay * X + sum of scale * U V^T + alpha * N V^T.
#include "factor_rows.h"
#include "lowrank_rows.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int kAtOnce = W == 16 ? 4 : 2;  // rows that share a panel's registers
constexpr int64_t kPanelBytes = 1 << 18;  // of second-level cache, both panels together, as in lowrank_update
constexpr int64_t kRoundCols = 2048;      // columns in fp32 scratch at once, for stochastic rounding

constexpr int64_t panel_ints(int64_t rank_bound) {
  return kPanelBytes / 4 > rank_bound * kBlock ? kPanelBytes / 4 : rank_bound * kBlock;
}

struct Scratch {
  int32_t u[LOZO_MAX_DRAWS * (LOZO_MAX_RANK / 2) * kMaxTileRows];
  int32_t pairs[panel_ints(LOZO_MAX_RANK / 2)];
  float floats[panel_ints(LOZO_MAX_RANK)];
  float rounding[kAtOnce * kRoundCols];
};

struct MomentumFactors {
  RowFactors draws;
  const float *n;  // (rows, rank)
  int rank;
  float alpha;
};

void update_momentum(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  const lozo_call &call = *op.call;
  const int64_t rank = call.rank;
  float *n = (float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row) * rank;
  const FactorArguments a = {call.coefficients + tile.index, op.count, call.beta[tile.index]};
  const auto update = call.num_draws == 1 ? update_factor<1> : update_factor<2>;
  update(n, rank, n, rank, (int)rank, tile, call, a, (FactorScratch *)scratch);
}

// RANK = 0 serves any rank and any scale.
template <class T, int RANK, int DRAWS, bool DECAY, int ROWS>
LOZO_INLINE void update_block(T *x, int64_t stride, int64_t count, const int32_t *pairs, const float *floats,
                              const MomentumFactors &f) {
  const int rank = RANK ? RANK : f.rank;
  Pair<F> y[ROWS], product[ROWS];
  prefetch_rows<T, ROWS>(x, stride);
  load_rows<T, ROWS, DECAY>(y, x, stride, count, splat(f.draws.decay));
  add_products<(RANK + 1) / 2, DRAWS, ROWS>(y, pairs, f.draws, [&f](int d, int p, int r) {
    return splat_int(f.draws.u[d * f.draws.draw_stride + p * f.draws.pair_stride + r * f.draws.apart]);
  });
  multiply_factor<RANK, ROWS>(product, floats, rank, [&f, rank](int r, int k) { return splat(f.n[r * f.draws.apart * rank + k]); });
  const F alpha = splat(f.alpha);
  for (int r = 0; r < ROWS; ++r) y[r] = {fma(product[r].a, alpha, y[r].a), fma(product[r].b, alpha, y[r].b)};
  store_rows<T, ROWS>(x, stride, y, count);
}

template <class T, int RANK, int DRAWS, bool DECAY, int ROWS>
LOZO_INLINE void update_rows(T *x, int64_t stride, int64_t cols, const int32_t *pairs, const float *floats,
                             const MomentumFactors &f) {
  const int64_t pairs_step = f.draws.pairs * kBlock, floats_step = f.rank * kBlock;
  int64_t j = 0;
  for (; j + kBlock <= cols; j += kBlock, pairs += pairs_step, floats += floats_step)
    update_block<T, RANK, DRAWS, DECAY, ROWS>(x + j, stride, kBlock, pairs, floats, f);
  if (j < cols) update_block<T, RANK, DRAWS, DECAY, ROWS>(x + j, stride, cols - j, pairs, floats, f);
}

template <class T, int RANK, int DRAWS, bool DECAY>
void update_panel(T *x, int64_t stride, int64_t rows, int64_t cols, const int32_t *pairs, const float *floats, MomentumFactors f) {
  const int64_t apart = f.draws.apart = rows / kAtOnce;
  for (int64_t i = 0; i < apart; ++i, x += stride, ++f.draws.u, f.n += f.rank)
    update_rows<T, RANK, DRAWS, DECAY, kAtOnce>(x, apart * stride, cols, pairs, floats, f);
  const int64_t done = kAtOnce * apart, skip = done - apart;
  x += skip * stride, f.draws.u += skip, f.n += skip * f.rank;
  for (int64_t i = done; i < rows; ++i, x += stride, ++f.draws.u, f.n += f.rank)
    update_rows<T, RANK, DRAWS, DECAY, 1>(x, stride, cols, pairs, floats, f);
}

template <class T>
using UpdatePanel = void (*)(T *, int64_t, int64_t, int64_t, const int32_t *, const float *, MomentumFactors);

template <class T, int RANK>
UpdatePanel<T> choose(int draws, bool decay) {
  if (draws == 1) return decay ? update_panel<T, RANK, 1, true> : update_panel<T, RANK, 1, false>;
  return decay ? update_panel<T, RANK, 2, true> : update_panel<T, RANK, 2, false>;
}

template <class T>
UpdatePanel<T> choose(int rank, int draws, bool decay, bool folded) {
  if constexpr (W > 4) {
    if (folded && rank == 1) return choose<T, 1>(draws, decay);
    if (folded && rank == 2) return choose<T, 2>(draws, decay);
    if (folded && rank == 4) return choose<T, 4>(draws, decay);
    if (folded && rank == 8) return choose<T, 8>(draws, decay);
  }
  return choose<T, 0>(draws, decay);
}

template <class T>
void update_panel_stochastic(T *x, int64_t stride, int64_t cols, Scratch *s, MomentumFactors f, UpdatePanel<float> update,
                             const RoundingKey &key, const Tile &tile, int64_t col) {
  for (int64_t i = 0; i < tile.rows; i += kAtOnce, f.draws.u += kAtOnce, f.n += kAtOnce * f.rank) {
    const int64_t some = tile.rows - i < kAtOnce ? tile.rows - i : kAtOnce;
    for (int64_t r = 0; r < some; ++r) read_row(s->rounding + r * cols, x + (i + r) * stride, cols);
    update(s->rounding, cols, some, cols, s->pairs, s->floats, f);
    for (int64_t r = 0; r < some; ++r)
      write_row_stochastic(x + (i + r) * stride, s->rounding + r * cols, cols, global_element(tile, i + r) + col, key);
  }
}

template <class T>
void update_tile(const Tile &tile, const OpCall &op, Scratch *s) {
  const lozo_call &call = *op.call;
  const int draws = (int)call.num_draws, rank = (int)call.rank, pairs = (rank + 1) / 2;
  const bool stochastic = call.rounding && sizeof(T) == 2;
  MomentumFactors f;
  f.rank = rank;
  f.alpha = call.alpha[tile.index];
  f.n = (const float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row) * rank;
  f.draws.u = s->u;
  f.draws.pairs = pairs;
  f.draws.pair_stride = kMaxTileRows;
  f.draws.draw_stride = pairs * kMaxTileRows;
  f.draws.unit = 0x1p-16f;
  f.draws.decay = call.decay ? call.decay[tile.index] : 1.0f;
  for (int d = 0; d < draws; ++d) {
    f.draws.scales[d] = call.scales[d * op.count + tile.index];
    factor_pairs(s->u + d * f.draws.draw_stride, kMaxTileRows, call.seed, kStreamU, call.draw_steps[d], call.directions[d],
                 tile.tensor->tensor_id, (uint64_t)global_row(tile, 0), tile.rows, rank);
  }
  const bool folded = W > 4 && fold_unit(f.draws, draws);
  const UpdatePanel<T> update = choose<T>(rank, draws, call.decay != nullptr, folded);
  int64_t width = kPanelBytes / 4 / (pairs + rank) / kBlock * kBlock;
  if (width < kBlock) width = kBlock;
  if (stochastic && width > kRoundCols) width = kRoundCols;
  const int64_t v_stride = tile.tensor->cols;
  const f16 *v = (const f16 *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  T *x = (T *)tile.tensor->x + weight_offset(tile, 0);
  for (int64_t j = 0; j < tile.cols; j += width) {
    const int64_t cols = tile.cols - j < width ? tile.cols - j : width;
    const bool interleaved = Io<T>::interleaved && !stochastic;
    build_pair_panel(s->pairs, interleaved, v + j, v_stride, rank, cols);
    build_float_panel(s->floats, interleaved, v + j, v_stride, rank, cols);
    if (!stochastic) {
      update(x + j, tile.tensor->row_stride, tile.rows, cols, s->pairs, s->floats, f);
    } else if constexpr (sizeof(T) == 2) {
      update_panel_stochastic(x + j, tile.tensor->row_stride, cols, s, f, choose<float>(rank, draws, call.decay != nullptr, folded),
                              rounding_key(call, *tile.tensor), tile, j);
    }
  }
}

void update_weights(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  Scratch *s = (Scratch *)scratch;
  switch (tile.tensor->dtype) {
    case LOZO_FLOAT32:
      return update_tile<float>(tile, op, s);
    case LOZO_BFLOAT16:
      return update_tile<bf16>(tile, op, s);
    default:
      return update_tile<f16>(tile, op, s);
  }
}

}  // namespace

// N comes first, in a pass of its own over little data, because a row of N serves tiles on several threads.
int lowrank_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  const int status = for_each_tile({tensors, count, call->threads, kRowGrain, false, sizeof(FactorScratch), update_momentum, &op});
  if (status != LOZO_OK) return status;
  return for_each_tile({tensors, count, call->threads, kMatrixGrain, false, sizeof(Scratch), update_weights, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
