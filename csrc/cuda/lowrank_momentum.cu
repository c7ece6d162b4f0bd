// N <- beta * N + sum of coefficient * U, then X <- decay * X + sum of scale * U V^T + alpha * N V^T.
#include "fragments.h"
#include "launch.h"
#include "lowrank_any.h"
#include "momentum_product.h"

namespace lozo {

// Works on tiles of rows: a thread updates four ranks of a row.
static __global__ void __launch_bounds__(kThreads) lowrank_momentum_factor(const Launch launch) {
  const Tile tile = find_tile(launch);
  const int rank = (int)launch.call.rank, draws = (int)launch.call.num_draws, groups = (rank + 3) / 4;
  float *n = (float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row) * rank;
  const float beta = of_tensor(launch.call.beta, launch, tile);
  for (int i = (int)threadIdx.x; i < tile.rows * groups; i += kThreads) {
    const int row = i / groups, group = i % groups, left = extent(4, rank - 4 * group);
    float *at = n + (int64_t)row * rank + 4 * group;
    float value[4] = {}, z[4];
    LOZO_UNROLL
    for (int k = 0; k < 4; ++k)
      if (k < left) value[k] = LOZO_MUL(load_global(at + k), beta);
    for (int d = 0; d < draws; ++d) {
      factor_values(z, draw_noise(launch, tile, kStreamU, d), (uint32_t)(global_row(tile) + row), group);
      const float coefficient = of_tensor(launch.call.coefficients, launch, tile, d);
      LOZO_UNROLL
      for (int k = 0; k < 4; ++k) value[k] = LOZO_ADD(value[k], LOZO_MUL(z[k], coefficient));
    }
    LOZO_UNROLL
    for (int k = 0; k < 4; ++k)
      if (k < left) store_global(at + k, value[k]);
  }
}

// PRODUCT says how N V^T is computed; see momentum_product.h.
template <class T, template <class> class PRODUCT, int DRAWS>
static __global__ void __launch_bounds__(kThreads, PRODUCT<T>::blocks - (DRAWS - 1)) lowrank_momentum_aligned(const Launch launch) {
  using Product = PRODUCT<T>;
  constexpr int STEPS = Product::steps, GROUPS = Product::groups;
  const Lane lane = this_lane();
  const Tile tile = find_tile(launch);
  const Weights<T> weights = weights_of<T>(tile, lane);
  const int rank = (int)launch.call.rank;
  const int64_t v_stride = tile.tensor->cols;
  const uint16_t *v = (const uint16_t *)tile.tensor->v + tile.matrix * rank * v_stride + tile.col;
  const float *n = (const float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row + lane.row) * rank;
  const float decay = decay_of(launch, tile), alpha = of_tensor(launch.call.alpha, launch, tile);
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
    Product momentum;
    momentum.take_rows(n + (int64_t)row * rank, rank, tile.rows - row - lane.row, lane);
    for (int col = kGroupCols * lane.warp; col < tile.cols; col += kGroupCols * kWarps) {
      Eight<T> x[GROUPS][2];
      load_weights(x, weights, row, col, lane);
      Columns<STEPS> columns;
      load_fragments<T>(columns, v + col, v_stride, rank, lane, tile.cols - col);
      momentum.take_columns(v + col, v_stride, tile.cols - col, lane);
      T *out = weights.x + row * weights.stride + col;
      LOZO_UNROLL
      for (int g = 0; g < GROUPS; ++g, out = made_here(out + kGroupRows * weights.stride)) {
        float y[2][8];
        unpack_scaled(y[0], x[g][0], decay);
        unpack_scaled(y[1], x[g][1], decay);
        LOZO_UNROLL
        for (int d = 0; d < DRAWS; ++d) add_product(y, u[d][g], columns, scales[d]);
        momentum.add_to(y, g, columns, alpha);
        store_weights(out, weights, y, row + kGroupRows * g, col, lane, launch, tile);
      }
    }
  }
}

static __global__ void __launch_bounds__(kThreads) lowrank_momentum_any(const Launch launch) { update_any<true>(launch); }

using Kernel = void (*)(Launch);

template <class T, template <class> class PRODUCT>
static Kernel for_draws(int64_t draws) {
  return draws == 1 ? lowrank_momentum_aligned<T, PRODUCT, 1> : lowrank_momentum_aligned<T, PRODUCT, 2>;
}

static Kernel choose_kernel(int64_t dtype, int64_t rank, int64_t draws) {
  if (dtype == LOZO_ANY_DTYPE) return lowrank_momentum_any;
  return for_dtype(dtype, [=](auto element) -> Kernel {
    using T = decltype(element);
    if (rank <= kExactRanks) return for_draws<T, ExactProduct>(draws);
    if (rank <= 16) return for_draws<T, SplitProduct16>(draws);
    return rank <= 32 ? for_draws<T, SplitProduct32>(draws) : for_draws<T, SplitProduct64>(draws);
  });
}

}  // namespace lozo

int lozo_cuda_lowrank_momentum_factor(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::lowrank_momentum_factor, lozo::kThreads, tiles, call);
}

int lozo_cuda_lowrank_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::choose_kernel(tiles->dtype, call->rank, call->num_draws), lozo::kThreads, tiles, call);
}
