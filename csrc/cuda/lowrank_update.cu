// X <- decay * X + sum over draws of scale * U V^T.
#include "fragments.h"
#include "launch.h"

namespace lozo {

// How many groups of rows of a half-precision type share a group's columns of V, and how many blocks run on a multiprocessor at
// once: as many as the registers allow.
constexpr int kRowGroups[3][LOZO_MAX_DRAWS] = {{4, 4}, {2, 2}, {2, 1}};
constexpr int kBlocks[3][LOZO_MAX_DRAWS] = {{4, 3}, {4, 2}, {2, 2}};

template <class T, int STEPS, int DRAWS>
static __global__ void __launch_bounds__(kThreads, kBlocks[STEPS / 2][DRAWS - 1]) lowrank_update_aligned(const Launch launch) {
  constexpr int HALVES = kRowGroups[STEPS / 2][DRAWS - 1], GROUPS = kPieces<T> == 1 || HALVES == 1 ? HALVES : HALVES / 2;
  const Lane lane = this_lane();
  const Tile tile = find_tile(launch);
  const Weights<T> weights = weights_of<T>(tile, lane);
  const int rank = (int)launch.call.rank;
  const int64_t v_stride = tile.tensor->cols;
  const uint16_t *v = (const uint16_t *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  const float decay = decay_of(launch, tile);
  float scales[DRAWS];
  LOZO_UNROLL
  for (int d = 0; d < DRAWS; ++d) scales[d] = of_tensor(launch.call.scales, launch, tile, d);

  for (int row = 0; row < tile.rows; row += kGroupRows * GROUPS) {
    Rows<STEPS> u[DRAWS][GROUPS];
    LOZO_UNROLL
    for (int d = 0; d < DRAWS; ++d) {
      const Noise noise = draw_noise(launch, tile, kStreamU, d);
      LOZO_UNROLL
      for (int g = 0; g < GROUPS; ++g)
        make_rows(u[d][g], noise, (uint32_t)global_row(tile) + row + kGroupRows * g + lane.row, lane.quad);
    }
    for (int col = kGroupCols * lane.warp; col < tile.cols; col += kGroupCols * kWarps) {
      Eight<T> x[GROUPS][2];
      load_weights(x, weights, row, col, lane);
      Columns<STEPS> columns;
      load_fragments<T>(columns, v + col, v_stride, rank, lane, tile.cols - col);
      T *out = weights.x + row * weights.stride + col;
      LOZO_UNROLL
      for (int g = 0; g < GROUPS; ++g, out = made_here(out + kGroupRows * weights.stride)) {
        float y[2][8];
        unpack_scaled(y[0], x[g][0], decay);
        unpack_scaled(y[1], x[g][1], decay);
        LOZO_UNROLL
        for (int d = 0; d < DRAWS; ++d) add_product(y, u[d][g], columns, scales[d]);
        store_weights(out, weights, y, row + kGroupRows * g, col, lane, launch, tile);
      }
    }
  }
}

constexpr int kAnyRows = 16;  // rows whose U is in shared memory at once

LOZO_DEVICE int grid_steps_of_f16(uint16_t bits) { return (int)LOZO_MUL(f16_to_float(bits), 256.0f); }

// U V^T of one element: an exact sum of integers, in steps of 2^-16.
LOZO_DEVICE float product_any(const int16_t *u, const uint16_t *v, int64_t v_stride, int rank) {
  int sum = 0;
  for (int k = 0; k < rank; ++k) sum += u[k] * grid_steps_of_f16(load_global(v + k * v_stride));
  return LOZO_MUL((float)sum, 0x1p-16f);
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

// For tensors of any dtype, strides and widths: one element after the other.
static __global__ void __launch_bounds__(kThreads) lowrank_update_any(const Launch launch) {
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
      const int64_t element = global_element(tile) + (first + row) * tensor.global_cols + col;
      if (launch.call.rounding) y = round_element(y, rounding, (uint64_t)element, dtype);
      store_element(tensor.x, at, dtype, y);
    }
    __syncthreads();
  }
}

using Kernel = void (*)(Launch);

static Kernel choose_kernel(int64_t dtype, int64_t rank, int64_t draws) {
  if (dtype == LOZO_ANY_DTYPE) return lowrank_update_any;
  return for_dtype(dtype, [=](auto element) {
    return for_steps(rank, [=](auto steps) -> Kernel {
      using T = decltype(element);
      if (draws == 1) return lowrank_update_aligned<T, decltype(steps)::value, 1>;
      return lowrank_update_aligned<T, decltype(steps)::value, 2>;
    });
  });
}

}  // namespace lozo

int lozo_cuda_lowrank_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::choose_kernel(tiles->dtype, call->rank, call->num_draws), lozo::kThreads, tiles, call);
}
