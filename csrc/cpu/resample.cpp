// V <- the V of a window; with reproject also N <- N (V_old^T V_new) / cols.
#include "noise_vec.h"
#include "ops.h"
#include "panel.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

constexpr int kCols = 256;  // columns at a time: few enough that int32 sums of their products cannot overflow
constexpr int kColsPadded = kCols + kBlock;

struct Scratch {
  int32_t pairs[(LOZO_MAX_RANK / 2) * kColsPadded];
  int16_t before[LOZO_MAX_RANK][kColsPadded];
  int16_t after[LOZO_MAX_RANK][kColsPadded];
  int64_t gram[LOZO_MAX_RANK][LOZO_MAX_RANK];
  float ratio[LOZO_MAX_RANK][LOZO_MAX_RANK];
};

struct ResampleCall {
  const lozo_call *call;
  bool reproject;
};

void read_before(Scratch *s, const f16 *v, int64_t v_stride, int rank, int64_t cols) {
  for (int k = 0; k < rank; ++k)
    for (int64_t j = 0; j < cols; j += kBlock) {
      const Pair<I> steps = load_block_steps(v + k * v_stride + j, cols - j);
      alignas(64) int32_t block[kBlock];
      store_int(block, steps.a);
      store_int(block + W, steps.b);
      for (int i = 0; i < kBlock; ++i) s->before[k][j + i] = (int16_t)block[i];
    }
}

void write_after(Scratch *s, f16 *v, int64_t v_stride, int rank, int64_t cols) {
  for (int k = 0; k < rank; ++k) {
    const int32_t *pairs = s->pairs + k / 2 * kColsPadded;
    for (int64_t j = 0; j < cols; ++j) s->after[k][j] = (int16_t)(k % 2 ? pairs[j] >> 16 : pairs[j]);
    for (int64_t j = 0; j < cols; j += kBlock) {
      alignas(64) float block[kBlock];
      for (int i = 0; i < kBlock; ++i) block[i] = (float)s->after[k][j + i] * kGridStep;
      const Pair<F> x = {load(block), load(block + W)};
      f16 *row = v + k * v_stride + j;
      if (cols - j >= kBlock) {
        Io<f16>::store(row, x);
      } else {
        store_partial(row, x, cols - j);
      }
    }
  }
}

void add_to_gram(Scratch *s, int rank, int64_t cols) {
  for (int a = 0; a < rank; ++a)
    for (int b = 0; b < rank; ++b) {
      int32_t sum = 0;
      for (int64_t j = 0; j < cols; ++j) sum += (int32_t)s->before[a][j] * s->after[b][j];
      s->gram[a][b] += sum;
    }
}

// n <- n * ratio with k ascending: a rounded product, then a fused multiply-add for each other k.
void reproject(Scratch *s, float *n, int64_t rows, int rank, int64_t cols) {
  for (int a = 0; a < rank; ++a)
    for (int b = 0; b < rank; ++b) s->ratio[a][b] = (float)((double)s->gram[a][b] * 0x1p-16 / (double)cols);
  for (int64_t i = 0; i < rows; ++i, n += rank) {
    float sum[LOZO_MAX_RANK];
    for (int b = 0; b < rank; ++b) sum[b] = n[0] * s->ratio[0][b];
    for (int k = 1; k < rank; ++k)
      for (int b = 0; b < rank; ++b) sum[b] = __builtin_fmaf(n[k], s->ratio[k][b], sum[b]);
    for (int b = 0; b < rank; ++b) n[b] = sum[b];
  }
}

// One matrix. Its columns are not divided, because the Gram matrix sums over them.
void resample_tile(const Tile &tile, char *scratch, const void *context) {
  const ResampleCall &op = *(const ResampleCall *)context;
  const lozo_tensor &t = *tile.tensor;
  const int rank = (int)op.call->rank;
  Scratch *s = (Scratch *)scratch;
  memset(s, 0, sizeof *s);
  f16 *v = (f16 *)t.v + tile.matrix * rank * t.cols;
  const int64_t first = t.col_offset + tile.matrix * t.global_cols;
  for (int64_t j = 0; j < t.cols; j += kCols) {
    const int64_t cols = t.cols - j < kCols ? t.cols - j : kCols;
    if (op.reproject) read_before(s, v + j, t.cols, rank, cols);
    factor_pairs(s->pairs, kColsPadded, op.call->seed, kStreamV, op.call->draw_steps[0], 0, t.tensor_id, (uint64_t)(first + j),
                 cols, rank);
    write_after(s, v + j, t.cols, rank, cols);
    if (op.reproject) add_to_gram(s, rank, cols);
  }
  if (op.reproject) reproject(s, (float *)t.n + tile.matrix * t.rows * rank, t.rows, rank, t.cols);
}

}  // namespace

int resample(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const ResampleCall op = {call, call->reproject != 0};
  return for_each_tile({tensors, count, call->threads, kWholeGrain, false, sizeof(Scratch), resample_tile, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
