// OUT <- decay * X + N V^T, the product with k ascending: a rounded multiply, then a fused multiply-add for each other k.
#include "fragments.h"
#include "launch.h"

namespace lozo {

constexpr int kMergeGroups = 2;  // groups of rows that share a group's columns of V
constexpr int kMergeBlocks = 4;  // that run on a multiprocessor at once

// The tile as the weights that are written lie.
LOZO_DEVICE Tile written_tile(const Launch &launch, Tile tile) {
  tile.tensor = launch.call.outputs + tile.index;
  return tile;
}

template <class T>
static __global__ void __launch_bounds__(kThreads, kMergeBlocks) lowrank_merge_aligned(const Launch launch) {
  const Lane lane = this_lane();
  const Tile tile = find_tile(launch), to = written_tile(launch, tile);
  const Weights<T> weights = weights_of<T>(tile, lane), written = weights_of<T>(to, lane);
  const int rank = (int)launch.call.rank;
  const int64_t v_stride = tile.tensor->cols;
  const uint16_t *v = (const uint16_t *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  const float decay = decay_of(launch, tile);
  for (int row = 0; row < tile.rows; row += kGroupRows * kMergeGroups) {
    const float *n = (const float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row + row + lane.row) * rank;
    for (int col = kGroupCols * lane.warp; col < tile.cols; col += kGroupCols * kWarps) {
      Eight<T> x[kMergeGroups][2];
      load_weights(x, weights, row, col, lane);
      float sum[kMergeGroups][2][8];
      LOZO_UNROLL
      for (int g = 0; g < kMergeGroups; ++g) {
        LOZO_UNROLL
        for (int i = 0; i < 8; ++i) sum[g][0][i] = sum[g][1][i] = -0.0f;  // with which the first is a rounded product
      }
      LOZO_NO_UNROLL
      for (int k = 0; k < rank; ++k) {
        uint32_t w[4];
        load_columns<T>(w, v + col + k * v_stride, lane.quad, true, tile.cols - col);
        float column[8];
        LOZO_UNROLL
        for (int i = 0; i < 4; ++i) column[2 * i] = low_half(f16(), w[i]), column[2 * i + 1] = high_half(f16(), w[i]);
        LOZO_UNROLL
        for (int g = 0; g < kMergeGroups; ++g) {
          LOZO_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int other = kGroupRows * g + 8 * half;
            const float factor = row + other < weights.rows ? load_global(n + (int64_t)other * rank + k) : 0.0f;
            LOZO_UNROLL
            for (int i = 0; i < 8; ++i) sum[g][half][i] = LOZO_FMA(factor, column[i], sum[g][half][i]);
          }
        }
      }
      // Where the compiler sees how this address is made, it stores 128 bits in four parts.
      T *out = made_here(written.x + row * written.stride + col);
      LOZO_UNROLL
      for (int g = 0; g < kMergeGroups; ++g, out = made_here(out + kGroupRows * written.stride)) {
        float y[2][8];
        LOZO_UNROLL
        for (int half = 0; half < 2; ++half) {
          unpack_scaled(y[half], x[g][half], decay);
          LOZO_UNROLL
          for (int i = 0; i < 8; ++i) y[half][i] = LOZO_ADD(y[half][i], sum[g][half][i]);
        }
        store_weights(out, written, y, row + kGroupRows * g, col, lane, launch, tile);
      }
    }
  }
}

// For tensors of any dtype, strides and widths: one element after the other.
static __global__ void __launch_bounds__(kThreads) lowrank_merge_any(const Launch launch) {
  const Tile tile = find_tile(launch), to = written_tile(launch, tile);
  const lozo_tensor &tensor = *tile.tensor;
  const int rank = (int)launch.call.rank, dtype = (int)tensor.dtype;
  const uint16_t *v = (const uint16_t *)tensor.v + tile.matrix * rank * tensor.cols + tile.col;
  const float *n = (const float *)tensor.n + (tile.matrix * tensor.rows + tile.row) * rank;
  const float decay = decay_of(launch, tile);
  const Noise rounding = rounding_noise(launch, tile);
  for (int64_t i = threadIdx.x; i < (int64_t)tile.rows * tile.cols; i += kThreads) {
    const int64_t row = i / tile.cols, col = i % tile.cols;
    float sum = -0.0f;  // with which the first is a rounded product
    for (int k = 0; k < rank; ++k)
      sum = LOZO_FMA(load_global(n + row * rank + k), f16_to_float(load_global(v + col + k * tensor.cols)), sum);
    float y = LOZO_ADD(LOZO_MUL(load_element(tensor.x, weight_offset(tile) + row * tensor.row_stride + col, dtype), decay), sum);
    const int64_t element = global_element(tile) + row * tensor.global_cols + col;
    if (launch.call.rounding) y = round_element(y, rounding, (uint64_t)element, dtype);
    store_element(to.tensor->x, weight_offset(to) + row * to.tensor->row_stride + col, dtype, y);
  }
}

using Kernel = void (*)(Launch);

static Kernel choose_kernel(int64_t dtype) {
  if (dtype == LOZO_ANY_DTYPE) return lowrank_merge_any;
  return for_dtype(dtype, [](auto element) -> Kernel { return lowrank_merge_aligned<decltype(element)>; });
}

}  // namespace lozo

int lozo_cuda_lowrank_merge(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true, 0)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::choose_kernel(tiles->dtype), lozo::kThreads, tiles, call);
}
