// F <- decay * F + sum over draws of scale * U; with momentum N <- beta * N + sum of coefficient * U first, and then F + alpha * N.
#include "fragments.h"
#include "launch.h"

namespace lozo {

// Works on tiles of rows: a thread updates four ranks of a row.
template <bool MOMENTUM>
LOZO_DEVICE void update_rows(const Launch &launch) {
  const Tile tile = find_tile(launch);
  const lozo_tensor &tensor = *tile.tensor;
  const int rank = (int)tensor.cols, draws = (int)launch.call.num_draws, groups = (rank + 3) / 4;
  float *f = (float *)tensor.x + weight_offset(tile);
  float *n = (float *)tensor.n + contiguous_offset(tile, rank);
  const float decay = decay_of(launch, tile);
  for (int i = (int)threadIdx.x; i < tile.rows * groups; i += kThreads) {
    const int row = i / groups, group = i % groups, left = extent(4, rank - 4 * group);
    float *f_at = f + row * tensor.row_stride + 4 * group, *n_at = n + (int64_t)row * rank + 4 * group;
    float value[4] = {}, carried[4] = {}, z[4];
    LOZO_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= left) continue;
      value[k] = LOZO_MUL(load_global(f_at + k), decay);
      if (MOMENTUM) carried[k] = LOZO_MUL(load_global(n_at + k), of_tensor(launch.call.beta, launch, tile));
    }
    for (int d = 0; d < draws; ++d) {
      factor_values(z, draw_noise(launch, tile, kStreamU, d), (uint32_t)(global_row(tile) + row), group);
      LOZO_UNROLL
      for (int k = 0; k < 4; ++k) {
        multiply_add(value[k], z[k], of_tensor(launch.call.scales, launch, tile, d));
        if (MOMENTUM) multiply_add(carried[k], z[k], of_tensor(launch.call.coefficients, launch, tile, d));
      }
    }
    LOZO_UNROLL
    for (int k = 0; k < 4; ++k) {
      if (k >= left) continue;
      if (MOMENTUM) {
        store_global(n_at + k, carried[k]);
        multiply_add(value[k], carried[k], of_tensor(launch.call.alpha, launch, tile));
      }
      store_global(f_at + k, value[k]);
    }
  }
}

static __global__ void __launch_bounds__(kThreads) factor_update(const Launch launch) { update_rows<false>(launch); }
static __global__ void __launch_bounds__(kThreads) factor_momentum(const Launch launch) { update_rows<true>(launch); }

}  // namespace lozo

int lozo_cuda_factor_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, false)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::factor_update, lozo::kThreads, tiles, call);
}

int lozo_cuda_factor_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, false)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::factor_momentum, lozo::kThreads, tiles, call);
}
