// X <- decay * X + sum over draws of scale * U V^T.
#include "lowrank_rows.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int64_t kPanelBytes = 1 << 17;  // of second-level cache: long runs of X's columns matter more than first-level hits
constexpr int kRoundRows = 4;             // rows in fp32 scratch at once, for stochastic rounding
constexpr int64_t kRoundCols = 2048;

template <class T, int PAIRS, int DRAWS, int ROWS>
LOZO_INLINE void update_rows(T *x, int64_t stride, int64_t cols, const int32_t *panel, const RowFactors &f) {
  // If the registers suffice, U stays in them over all columns.
  constexpr bool hoist = PAIRS > 0 && PAIRS * DRAWS * ROWS <= (kRegisters == 32 ? 16 : 4);
  I held[hoist ? DRAWS * PAIRS * ROWS : 1];
  const auto read = [&f](int d, int p, int r) { return splat_int(f.u[d * f.draw_stride + p * f.pair_stride + r * f.apart]); };
  if (hoist)
    for (int d = 0; d < DRAWS; ++d)
      for (int p = 0; p < PAIRS; ++p)
        for (int r = 0; r < ROWS; ++r) held[(d * PAIRS + p) * ROWS + r] = read(d, p, r);
  const auto load_u = [&](int d, int p, int r) { return hoist ? held[(d * PAIRS + p) * ROWS + r] : read(d, p, r); };
  const F decay = splat(f.decay);
  const int64_t step = (PAIRS ? PAIRS : f.pairs) * kBlock;
  Pair<F> y[ROWS];
  int64_t j = 0;
  for (; j + kBlock <= cols; j += kBlock, panel += step) {
    prefetch_rows<T, ROWS>(x + j, stride);
    load_rows<T, ROWS, true>(y, x + j, stride, kBlock, decay);
    add_products<PAIRS, DRAWS, ROWS>(y, panel, f, load_u);
    store_rows<T, ROWS>(x + j, stride, y, kBlock);
  }
  if (j < cols) {
    load_rows<T, ROWS, true>(y, x + j, stride, cols - j, decay);
    add_products<PAIRS, DRAWS, ROWS>(y, panel, f, load_u);
    store_rows<T, ROWS>(x + j, stride, y, cols - j);
  }
}

// Rows that are left over when rows are taken several at once. They are few, so that one function serves all ranks.
template <class T, int DRAWS>
void update_rest(T *x, int64_t stride, int64_t rows, int64_t cols, const int32_t *panel, RowFactors f) {
  for (int64_t i = 0; i < rows; ++i, x += stride, ++f.u) update_rows<T, 0, DRAWS, 1>(x, stride, cols, panel, f);
}

template <class T, int PAIRS, int DRAWS>
void update_panel(T *x, int64_t stride, int64_t rows, int64_t cols, const int32_t *panel, RowFactors f) {
  // Two draws need twice the sums: with 16 registers only two rows share a panel's.
  constexpr int at_once = kRegisters == 32 || DRAWS == 1 ? 4 : 2;
  f.apart = rows / at_once;
  for (int64_t i = 0; i < f.apart; ++i, x += stride, ++f.u)
    update_rows<T, PAIRS, DRAWS, at_once>(x, f.apart * stride, cols, panel, f);
  const int64_t done = at_once * f.apart;
  x += (done - f.apart) * stride, f.u += done - f.apart;
  update_rest<T, DRAWS>(x, stride, rows - done, cols, panel, f);
}

template <class T>
using UpdatePanel = void (*)(T *, int64_t, int64_t, int64_t, const int32_t *, RowFactors);

template <class T, int PAIRS>
UpdatePanel<T> choose(int draws) {
  return draws == 1 ? update_panel<T, PAIRS, 1> : update_panel<T, PAIRS, 2>;
}

template <class T>
UpdatePanel<T> choose(int pairs, int draws, bool folded) {
  if constexpr (kRegisters > 8) {
    if (folded && pairs == 1) return choose<T, 1>(draws);
    if (folded && pairs == 2) return choose<T, 2>(draws);
    if (folded && pairs == 4) return choose<T, 4>(draws);
  }
  return choose<T, 0>(draws);
}

struct Scratch {
  int32_t u[LOZO_MAX_DRAWS * (LOZO_MAX_RANK / 2) * kMaxTileRows];
  // kPanelBytes, but at least one block of columns at the highest rank.
  int32_t panel[kPanelBytes / 4 > LOZO_MAX_RANK / 2 * kBlock ? kPanelBytes / 4 : LOZO_MAX_RANK / 2 * kBlock];
  float rounding[kRoundRows * kRoundCols];
};

template <class T>
void update_stochastic(T *x, int64_t stride, int64_t rows, int64_t cols, const int32_t *panel, RowFactors f,
                       UpdatePanel<float> update, float *scratch, const RoundingKey &key, const Tile &tile, int64_t col) {
  for (int64_t i = 0; i < rows; i += kRoundRows, f.u += kRoundRows) {
    const int64_t some = rows - i < kRoundRows ? rows - i : kRoundRows;
    for (int64_t r = 0; r < some; ++r) read_row(scratch + r * cols, x + (i + r) * stride, cols);
    update(scratch, cols, some, cols, panel, f);
    for (int64_t r = 0; r < some; ++r)
      write_row_stochastic(x + (i + r) * stride, scratch + r * cols, cols, global_element(tile, i + r) + col, key);
  }
}

template <class T>
void update_tile(const Tile &tile, const lozo_call &call, int64_t count, Scratch *s) {
  const int draws = (int)call.num_draws, rank = (int)call.rank, pairs = (rank + 1) / 2;
  const bool stochastic = call.rounding && sizeof(T) == 2;
  RowFactors f;
  f.u = s->u;
  f.pairs = pairs;
  f.unit = 0x1p-16f;
  f.pair_stride = kMaxTileRows;
  f.draw_stride = pairs * kMaxTileRows;
  f.decay = call.decay ? call.decay[tile.index] : 1.0f;
  for (int d = 0; d < draws; ++d) {
    f.scales[d] = call.scales[d * count + tile.index];
    factor_pairs(s->u + d * f.draw_stride, f.pair_stride, call.seed, kStreamU, call.draw_steps[d], call.directions[d],
                 tile.tensor->tensor_id, (uint64_t)global_row(tile, 0), tile.rows, rank);
  }
  const bool folded = kRegisters > 8 && fold_unit(f, draws);
  const UpdatePanel<T> update = choose<T>(pairs, draws, folded);
  const UpdatePanel<float> update_float = choose<float>(pairs, draws, folded);

  int64_t width = kPanelBytes / 4 / pairs / kBlock * kBlock;
  if (width < kBlock) width = kBlock;
  if (stochastic && width > kRoundCols) width = kRoundCols;
  const int64_t v_stride = tile.tensor->cols;
  const f16 *v = (const f16 *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  T *x = (T *)tile.tensor->x + weight_offset(tile, 0);
  for (int64_t j = 0; j < tile.cols; j += width) {
    const int64_t cols = tile.cols - j < width ? tile.cols - j : width;
    build_pair_panel(s->panel, Io<T>::interleaved && !stochastic, v + j, v_stride, rank, cols);
    if (!stochastic) {
      update(x + j, tile.tensor->row_stride, tile.rows, cols, s->panel, f);
    } else if constexpr (sizeof(T) == 2) {
      update_stochastic(x + j, tile.tensor->row_stride, tile.rows, cols, s->panel, f, update_float, s->rounding,
                        rounding_key(call, *tile.tensor), tile, j);
    }
  }
}

void any_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  Scratch *s = (Scratch *)scratch;
  switch (tile.tensor->dtype) {
    case LOZO_FLOAT32:
      return update_tile<float>(tile, *op.call, op.count, s);
    case LOZO_BFLOAT16:
      return update_tile<bf16>(tile, *op.call, op.count, s);
    default:
      return update_tile<f16>(tile, *op.call, op.count, s);
  }
}

}  // namespace

int lowrank_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile({tensors, count, call->threads, kMatrixGrain, false, sizeof(Scratch), any_tile, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
