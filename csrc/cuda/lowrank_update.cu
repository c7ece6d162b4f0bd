// X <- decay * X + sum over draws of scale * U V^T.
#include "fragments.h"
#include "launch.h"
#include "lowrank_any.h"

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

static __global__ void __launch_bounds__(kThreads) lowrank_update_any(const Launch launch) { update_any<false>(launch); }

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
