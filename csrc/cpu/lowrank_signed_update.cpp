// X <- decay * X + (U V^T) o Q, Q = sum over the parts of a batch of scale * r s^T, r and s being signs of rows and columns.
#include "lowrank_rows.h"
#include "ops.h"
#include "rounding.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int kAtOnce = 4;                // rows that share a panel's registers
constexpr int64_t kPanelBytes = 1 << 15;  // of the two panels together: every row reads both again
constexpr int64_t kMostCols = 2048;       // of a panel, and of rows in fp32 scratch for stochastic rounding
constexpr int64_t kPanel = kPanelBytes / 4 > kBlock *LOZO_MAX_PARTS ? kPanelBytes / 4 : kBlock * LOZO_MAX_PARTS;
constexpr int64_t kPairs = kPanelBytes / 4 > kBlock *LOZO_MAX_RANK / 2 ? kPanelBytes / 4 : kBlock * LOZO_MAX_RANK / 2;

struct Scratch {
  int32_t u[LOZO_MAX_RANK / 2 * kMaxTileRows];
  float r[LOZO_MAX_PARTS * kMaxTileRows];  // scale * r: (rows, parts)
  int32_t v[kPairs];
  float s[kPanel];
  int32_t words[kMostCols / 32 + 2 * kBlock];
  float rounding[kAtOnce * kMostCols];
};

// What a tile's rows are multiplied with. Rows that share a panel's registers lie ``apart`` rows from each other, as in RowFactors.
struct Factors {
  const int32_t *u;  // int16 pairs: u[pair * kMaxTileRows + row]
  const float *r;
  const int32_t *v;
  const float *s;
  int pairs, parts;
  float decay;
};

// The words whose bits are the signs from global index ``first`` on, so many that 32 bits can be read from any of ``count`` signs.
// Returns the position of the first sign among their bits.
int64_t sign_words(int32_t *words, const lozo_call &call, int64_t tensor_id, Stream stream, int64_t part, int64_t first,
                   int64_t count) {
  const int64_t counter = first >> 7, skipped = first & 127;
  const Counters counters = make_counters(call.seed, direction_word(0, call.directions[0] + part), (uint32_t)tensor_id,
                                          draw_word(stream, call.draw_steps[0]));
  for (int64_t i = 0; i * 32 < skipped + count + 32; i += kBlock) {
    Pair<I> made[1];
    flat_words<false>(made, counters, (uint32_t)(counter + i / 4));
    memcpy(words + i, made, sizeof made);
  }
  return skipped;
}

LOZO_INLINE uint32_t bits_at(const int32_t *words, int64_t position) {
  const uint64_t two = (uint64_t)(uint32_t)words[(position >> 5) + 1] << 32 | (uint32_t)words[position >> 5];
  return (uint32_t)(two >> (position & 31));
}

// r of a tile's rows times the scales: out[row * parts + part].
void scaled_row_signs(float *out, int32_t *words, const Tile &tile, const OpCall &op) {
  const lozo_call &call = *op.call;
  for (int64_t p = 0; p < call.parts; ++p) {
    const int64_t at = sign_words(words, call, tile.tensor->tensor_id, kStreamRowSigns, p, global_row(tile, 0), tile.rows);
    const uint32_t scale = bits_from_float(call.scales[p * op.count + tile.index]);
    for (int64_t i = 0; i < tile.rows; ++i) out[i * call.parts + p] = float_from_bits(scale ^ bits_at(words, at + i) << 31);
  }
}

// s of a panel's columns: panel[(block * parts + part) * kBlock].
template <bool interleaved>
void build_sign_panel(float *panel, int32_t *words, const lozo_call &call, int64_t tensor_id, int64_t first, int64_t cols) {
  const Pair<I> lanes = lane_bits<interleaved>();
  for (int64_t p = 0; p < call.parts; ++p) {
    const int64_t at = sign_words(words, call, tensor_id, kStreamColumnSigns, p, first, cols);
    float *out = panel + p * kBlock;
    for (int64_t j = 0; j < cols; j += kBlock, out += call.parts * kBlock) {
      const I bits = splat_int((int32_t)bits_at(words, at + j));
      store(out, negate_where(splat(1.0f), bits, lanes.a));
      store(out + W, negate_where(splat(1.0f), bits, lanes.b));
    }
  }
}

// y += (U V^T) o Q for one block of columns.
template <int ROWS>
LOZO_INLINE void add_signed_products(Pair<F> *y, const int32_t *v, const float *s, const Factors &f, int64_t apart) {
  Pair<F> q[ROWS];
  const Pair<F> first = {load(s), load(s + W)};
  for (int r = 0; r < ROWS; ++r) {
    const F scale = splat(f.r[r * apart * f.parts]);
    q[r] = {mul(scale, first.a), mul(scale, first.b)};
  }
  for (int p = 1; p < f.parts; ++p) {
    const Pair<F> sign = {load(s + p * kBlock), load(s + p * kBlock + W)};
    for (int r = 0; r < ROWS; ++r) {
      const F scale = splat(f.r[r * apart * f.parts + p]);
      q[r] = {fma(scale, sign.a, q[r].a), fma(scale, sign.b, q[r].b)};  // exact products, so that the sum alone is rounded
    }
  }
  for (int r = 0; r < ROWS; ++r) {
    Pair<I> sum = {zero_int(), zero_int()};
    for (int p = 0; p < f.pairs; ++p) {
      const I u = splat_int(f.u[p * kMaxTileRows + r * apart]);
      sum = {dot_pairs(sum.a, u, load_int(v + p * kBlock)), dot_pairs(sum.b, u, load_int(v + p * kBlock + W))};
    }
    const F unit = splat(0x1p-16f);
    const Pair<F> product = {mul(to_float(sum.a), unit), mul(to_float(sum.b), unit)};
    y[r] = {add(y[r].a, mul(product.a, q[r].a)), add(y[r].b, mul(product.b, q[r].b))};
  }
}

template <class T, int ROWS>
LOZO_INLINE void update_rows(T *x, int64_t stride, int64_t cols, const Factors &f, int64_t apart) {
  const F decay = splat(f.decay);
  const int32_t *v = f.v;
  const float *s = f.s;
  Pair<F> y[ROWS];
  for (int64_t j = 0; j < cols; j += kBlock, v += f.pairs * kBlock, s += f.parts * kBlock) {
    const int64_t count = cols - j < kBlock ? cols - j : kBlock;
    prefetch_rows<T, ROWS>(x + j, apart * stride);
    load_rows<T, ROWS, true>(y, x + j, apart * stride, count, decay);  // without decay it is 1, which changes nothing
    add_signed_products<ROWS>(y, v, s, f, apart);
    store_rows<T, ROWS>(x + j, apart * stride, y, count);
  }
}

template <class T>
void update_panel(T *x, int64_t stride, int64_t rows, int64_t cols, Factors f) {
  const int64_t apart = rows / kAtOnce;
  for (int64_t i = 0; i < apart; ++i, x += stride, ++f.u, f.r += f.parts) update_rows<T, kAtOnce>(x, stride, cols, f, apart);
  const int64_t done = kAtOnce * apart;
  x += (done - apart) * stride, f.u += done - apart, f.r += (done - apart) * f.parts;
  for (int64_t i = done; i < rows; ++i, x += stride, ++f.u, f.r += f.parts) update_rows<T, 1>(x, stride, cols, f, 1);
}

template <class T>
void update_stochastic(T *x, int64_t stride, int64_t cols, Factors f, float *scratch, const RoundingKey &key, const Tile &tile,
                       int64_t col) {
  for (int64_t i = 0; i < tile.rows; i += kAtOnce, f.u += kAtOnce, f.r += kAtOnce * f.parts) {
    const int64_t some = tile.rows - i < kAtOnce ? tile.rows - i : kAtOnce;
    for (int64_t r = 0; r < some; ++r) read_row(scratch + r * cols, x + (i + r) * stride, cols);
    update_panel(scratch, cols, some, cols, f);
    for (int64_t r = 0; r < some; ++r)
      write_row_stochastic(x + (i + r) * stride, scratch + r * cols, cols, global_element(tile, i + r) + col, key);
  }
}

template <class T>
void update_tile(const Tile &tile, const OpCall &op, Scratch *scratch) {
  const lozo_call &call = *op.call;
  const lozo_tensor &tensor = *tile.tensor;
  const int rank = (int)call.rank;
  const bool stochastic = call.rounding && sizeof(T) == 2;
  const Factors f = {
      scratch->u, scratch->r, scratch->v, scratch->s, (rank + 1) / 2, (int)call.parts, call.decay ? call.decay[tile.index] : 1.0f};
  factor_pairs(scratch->u, kMaxTileRows, call.seed, kStreamU, call.draw_steps[0], 0, tensor.tensor_id,
               (uint64_t)global_row(tile, 0), tile.rows, rank);
  scaled_row_signs(scratch->r, scratch->words, tile, op);
  int64_t width = kPanelBytes / 4 / (f.pairs + f.parts) / kBlock * kBlock;
  if (width < kBlock) width = kBlock;
  if (width > kMostCols) width = kMostCols;
  const int64_t v_stride = tensor.cols, first = tensor.col_offset + tile.matrix * tensor.global_cols + tile.col;
  const f16 *v = (const f16 *)tensor.v + tile.matrix * rank * v_stride + tile.col;
  T *x = (T *)tensor.x + weight_offset(tile, 0);
  for (int64_t j = 0; j < tile.cols; j += width) {
    const int64_t cols = tile.cols - j < width ? tile.cols - j : width;
    const bool interleaved = Io<T>::interleaved && !stochastic;
    build_pair_panel(scratch->v, interleaved, v + j, v_stride, rank, cols);
    if (interleaved)
      build_sign_panel<true>(scratch->s, scratch->words, call, tensor.tensor_id, first + j, cols);
    else
      build_sign_panel<false>(scratch->s, scratch->words, call, tensor.tensor_id, first + j, cols);
    if (!stochastic) {
      update_panel(x + j, tensor.row_stride, tile.rows, cols, f);
    } else if constexpr (sizeof(T) == 2) {
      update_stochastic(x + j, tensor.row_stride, cols, f, scratch->rounding, rounding_key(call, tensor), tile, j);
    }
  }
}

void any_tile(const Tile &tile, char *scratch, const void *context) {
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

int lowrank_signed_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile({tensors, count, call->threads, kMatrixGrain, false, sizeof(Scratch), any_tile, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
