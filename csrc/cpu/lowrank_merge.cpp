// OUT <- decay * X + (N + scale * U) V^T.
#include "factor_rows.h"
#include "lowrank_rows.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int kAtOnce = 4;                // rows that share a panel's registers, and what is read of the panel
constexpr int64_t kPanelBytes = 1 << 18;  // of second-level cache, as in lowrank_update
constexpr int64_t kRoundCols = 2048;      // columns in fp32 scratch at once, for stochastic rounding
constexpr int64_t kPanelFloats = kPanelBytes / 4 > LOZO_MAX_RANK *kBlock ? kPanelBytes / 4 : LOZO_MAX_RANK * kBlock;

struct Scratch {
  FactorScratch u;
  float c[LOZO_MAX_RANK * kMaxTileRows];
  float panel[kPanelFloats];
  float rounding[kAtOnce * kRoundCols];
};

// Where rows are read and written. Rows that share a panel's registers lie ``apart`` rows from each other, as in RowFactors.
template <class T>
struct Rows {
  const T *x;
  T *out;
  int64_t stride, out_stride, apart;
  const float *c;  // N + scale * U: (rows, rank)
  float decay;

  void advance(int64_t rows, int rank) { x += rows * stride, out += rows * out_stride, c += rows * rank; }
};

// y += C V^T for one block of columns.
template <int RANK, int ROWS, class LoadC>
LOZO_INLINE void add_product(Pair<F> *y, const float *panel, int rank, LoadC load_c) {
  Pair<F> sum[ROWS];
  multiply_factor<RANK, ROWS>(sum, panel, rank, load_c);
  for (int r = 0; r < ROWS; ++r) y[r] = {add(y[r].a, sum[r].a), add(y[r].b, sum[r].b)};
}

// RANK = 0 serves any rank.
template <class T, int RANK, int ROWS>
LOZO_INLINE void merge_rows(const Rows<T> &rows, int64_t cols, const float *panel, int any_rank) {
  // If the registers suffice, C stays in them over all columns. Otherwise its numbers are read again: they cost less than V would.
  constexpr bool hoist = RANK > 0 && RANK * ROWS <= (kRegisters == 32 ? 16 : 4);
  const int rank = RANK ? RANK : any_rank;
  F held[hoist ? RANK * ROWS : 1];
  const auto read = [&rows, rank](int r, int k) { return splat(rows.c[r * rows.apart * rank + k]); };
  if (hoist)
    for (int r = 0; r < ROWS; ++r)
      for (int k = 0; k < RANK; ++k) held[r * RANK + k] = read(r, k);
  const auto load_c = [&](int r, int k) { return hoist ? held[r * RANK + k] : read(r, k); };
  const int64_t stride = rows.apart * rows.stride, out_stride = rows.apart * rows.out_stride;
  const F decay = splat(rows.decay);
  Pair<F> y[ROWS];
  int64_t j = 0;
  for (; j + kBlock <= cols; j += kBlock, panel += rank * kBlock) {
    prefetch_rows<T, ROWS>(rows.x + j, stride);
    load_rows<T, ROWS, true>(y, rows.x + j, stride, kBlock, decay);
    add_product<RANK, ROWS>(y, panel, rank, load_c);
    store_rows<T, ROWS>(rows.out + j, out_stride, y, kBlock);
  }
  if (j < cols) {
    load_rows<T, ROWS, true>(y, rows.x + j, stride, cols - j, decay);
    add_product<RANK, ROWS>(y, panel, rank, load_c);
    store_rows<T, ROWS>(rows.out + j, out_stride, y, cols - j);
  }
}

// Rows that are left over when rows are taken several at once. They are few, so that one function serves all ranks.
template <class T>
void merge_rest(Rows<T> rows, int64_t count, int64_t cols, const float *panel, int rank) {
  for (int64_t i = 0; i < count; ++i, rows.advance(1, rank)) merge_rows<T, 0, 1>(rows, cols, panel, rank);
}

template <class T, int RANK>
void merge_panel(Rows<T> rows, int64_t count, int64_t cols, const float *panel, int rank) {
  rows.apart = count / kAtOnce;
  for (int64_t i = 0; i < rows.apart; ++i, rows.advance(1, rank)) merge_rows<T, RANK, kAtOnce>(rows, cols, panel, rank);
  const int64_t done = kAtOnce * rows.apart;
  rows.advance(done - rows.apart, rank);
  merge_rest(rows, count - done, cols, panel, rank);
}

template <class T>
using MergePanel = void (*)(Rows<T>, int64_t, int64_t, const float *, int);

template <class T>
MergePanel<T> choose(int rank) {
  if constexpr (kRegisters > 8) {
    if (rank == 1) return merge_panel<T, 1>;
    if (rank == 2) return merge_panel<T, 2>;
    if (rank == 4) return merge_panel<T, 4>;
    if (rank == 8) return merge_panel<T, 8>;
  }
  return merge_panel<T, 0>;
}

template <class T>
void merge_panel_stochastic(Rows<T> rows, int64_t cols, Scratch *s, int rank, MergePanel<float> merge, const RoundingKey &key,
                            const Tile &tile, int64_t col) {
  for (int64_t i = 0; i < tile.rows; i += kAtOnce, rows.advance(kAtOnce, rank)) {
    const int64_t some = tile.rows - i < kAtOnce ? tile.rows - i : kAtOnce;
    for (int64_t r = 0; r < some; ++r) read_row(s->rounding + r * cols, rows.x + r * rows.stride, cols);
    merge({s->rounding, s->rounding, cols, cols, 0, rows.c, rows.decay}, some, cols, s->panel, rank);
    for (int64_t r = 0; r < some; ++r)
      write_row_stochastic(rows.out + r * rows.out_stride, s->rounding + r * cols, cols, global_element(tile, i + r) + col, key);
  }
}

// N + scale * U of a tile's rows.
const float *merged_factor(const Tile &tile, const OpCall &op, Scratch *s) {
  const lozo_call &call = *op.call;
  const int64_t rank = call.rank;
  const float *n = (const float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row) * rank;
  if (call.num_draws == 0) return n;
  const float *u;
  make_draws<1>(&u, (int)rank, tile, call, &s->u);
  add_rows<1>(s->c, rank, n, rank, (int)rank, tile.rows, &u, {call.scales + tile.index, op.count, 1.0f});
  return s->c;
}

template <class T>
void merge_tile(const Tile &tile, const OpCall &op, Scratch *s) {
  const lozo_call &call = *op.call;
  const int rank = (int)call.rank;
  const bool stochastic = call.rounding && sizeof(T) == 2;
  Rows<T> rows;
  rows.x = (const T *)tile.tensor->x + weight_offset(tile, 0);
  rows.out = (T *)tile.out->x + out_offset(tile, 0);
  rows.stride = tile.tensor->row_stride;
  rows.out_stride = tile.out->row_stride;
  rows.c = merged_factor(tile, op, s);
  rows.decay = call.decay ? call.decay[tile.index] : 1.0f;
  const MergePanel<T> merge = choose<T>(rank);
  int64_t width = kPanelFloats / rank / kBlock * kBlock;
  if (stochastic && width > kRoundCols) width = kRoundCols;
  const int64_t v_stride = tile.tensor->cols;
  const f16 *v = (const f16 *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  for (int64_t j = 0; j < tile.cols; j += width, rows.x += width, rows.out += width) {
    const int64_t cols = tile.cols - j < width ? tile.cols - j : width;
    build_float_panel(s->panel, Io<T>::interleaved && !stochastic, v + j, v_stride, rank, cols);
    if (!stochastic) {
      merge(rows, tile.rows, cols, s->panel, rank);
    } else if constexpr (sizeof(T) == 2) {
      merge_panel_stochastic(rows, cols, s, rank, choose<float>(rank), rounding_key(call, *tile.tensor), tile, j);
    }
  }
}

void merge_any(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  Scratch *s = (Scratch *)scratch;
  switch (tile.tensor->dtype) {
    case LOZO_FLOAT32:
      return merge_tile<float>(tile, op, s);
    case LOZO_BFLOAT16:
      return merge_tile<bf16>(tile, op, s);
    default:
      return merge_tile<f16>(tile, op, s);
  }
}

}  // namespace

int lowrank_merge(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile({tensors, count, call->threads, kMatrixGrain, false, sizeof(Scratch), merge_any, &op, call->out});
}

}  // namespace LOZO_ISA
}  // namespace lozo
