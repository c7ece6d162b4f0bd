// The low-rank ops for tensors of any dtype, strides and widths: one element after the other.
#ifndef LOZO_CUDA_LOWRANK_ANY_H
#define LOZO_CUDA_LOWRANK_ANY_H

#include "fragments.h"

namespace lozo {

constexpr int kAnyRows = 16;  // rows whose U is in shared memory at once

LOZO_DEVICE int grid_steps_of_f16(uint16_t bits) { return (int)LOZO_MUL(f16_to_float(bits), 256.0f); }

// U V^T of one element: an exact sum of integers, in steps of 2^-16.
LOZO_DEVICE float product_any(const int16_t *u, const uint16_t *v, int64_t v_stride, int rank) {
  int sum = 0;
  for (int k = 0; k < rank; ++k) sum += u[k] * grid_steps_of_f16(load_global(v + k * v_stride));
  return LOZO_MUL((float)sum, 0x1p-16f);
}

LOZO_DEVICE float momentum_product_any(const float *n, const uint16_t *v, int64_t v_stride, int rank) {
  float sum = -0.0f;  // with which the first is a rounded product
  for (int k = 0; k < rank; ++k) sum = LOZO_FMA(load_global(n + k), f16_to_float(load_global(v + k * v_stride)), sum);
  return sum;
}

// Writes U of some rows of the tile to shared memory.
LOZO_DEVICE void share_factors(int16_t (*u)[kAnyRows][LOZO_MAX_RANK], const Launch &launch, const Tile &tile, int first, int rows) {
  const int draws = (int)launch.call.num_draws, groups = ((int)launch.call.rank + 3) / 4;
  for (int i = (int)threadIdx.x; i < draws * rows * groups; i += kThreads) {
    const int d = i / (rows * groups), row = i / groups % rows, group = i % groups;
    float z[4];
    factor_values(z, draw_noise(launch, tile, kStreamU, d), (uint32_t)(global_row(tile) + first + row), group);
    for (int k = 0; k < 4; ++k) u[d][row][4 * group + k] = (int16_t)LOZO_MUL(z[k], 256.0f);
  }
}

template <bool MOMENTUM>
LOZO_DEVICE void update_any(const Launch &launch) {
  __shared__ int16_t u[LOZO_MAX_DRAWS][kAnyRows][LOZO_MAX_RANK];
  const Tile tile = find_tile(launch);
  const lozo_tensor &tensor = *tile.tensor;
  const int rank = (int)launch.call.rank, draws = (int)launch.call.num_draws, dtype = (int)tensor.dtype;
  const uint16_t *v = (const uint16_t *)tensor.v + tile.matrix * rank * tensor.cols + tile.col;
  const float decay = decay_of(launch, tile);
  const Noise rounding = rounding_noise(launch, tile);
  for (int first = 0; first < tile.rows; first += kAnyRows) {
    const int rows = extent(kAnyRows, tile.rows - first);
    share_factors(u, launch, tile, first, rows);
    __syncthreads();
    for (int64_t i = threadIdx.x; i < (int64_t)rows * tile.cols; i += kThreads) {
      const int row = (int)(i / tile.cols), col = (int)(i % tile.cols);
      const int64_t at = weight_offset(tile) + (first + row) * tensor.row_stride + col;
      float y = LOZO_MUL(load_element(tensor.x, at, dtype), decay);
      for (int d = 0; d < draws; ++d)
        y = LOZO_ADD(y,
                     LOZO_MUL(product_any(u[d][row], v + col, tensor.cols, rank), of_tensor(launch.call.scales, launch, tile, d)));
      if (MOMENTUM) {
        const float *n = (const float *)tensor.n + (tile.matrix * tensor.rows + tile.row + first + row) * rank;
        y = LOZO_FMA(momentum_product_any(n, v + col, tensor.cols, rank), of_tensor(launch.call.alpha, launch, tile), y);
      }
      const int64_t element = global_element(tile) + (first + row) * tensor.global_cols + col;
      if (launch.call.rounding) y = round_element(y, rounding, (uint64_t)element, dtype);
      store_element(tensor.x, at, dtype, y);
    }
    __syncthreads();
  }
}

}  // namespace lozo

#endif
