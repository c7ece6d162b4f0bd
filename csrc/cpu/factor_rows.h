// Rows of a factor, or of a momentum N: decay, then U of each draw.
#ifndef LOZO_FACTOR_ROWS_H
#define LOZO_FACTOR_ROWS_H

#include "lozo/abi.h"
#include "noise_vec.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {

struct FactorScratch {
  float u[LOZO_MAX_DRAWS][LOZO_MAX_RANK * kMaxTileRows];
};

// ``scales`` are those of the tile's tensor, ``scales_apart`` numbers from draw to draw. The factor is multiplied by ``decay``
// first.
struct FactorArguments {
  const float *scales;
  int64_t scales_apart;
  float decay;
};

static inline FactorArguments scales_of(const Tile &tile, const OpCall &op) {
  return {op.call->scales + tile.index, op.count, op.call->decay ? op.call->decay[tile.index] : 1.0f};
}

template <int DRAWS>
LOZO_INLINE void add_draws(float *out, const float *f, const float *const *u, int64_t count, const float *scales, float decay) {
  int64_t i = 0;
  for (; i + W <= count; i += W) {
    F value = mul(load(f + i), splat(decay));
    for (int d = 0; d < DRAWS; ++d) value = add(value, mul(load(u[d] + i), splat(scales[d])));
    store(out + i, value);
  }
  for (; i < count; ++i) {
    float value = f[i] * decay;
    for (int d = 0; d < DRAWS; ++d) value = value + u[d][i] * scales[d];
    out[i] = value;
  }
}

// U of each draw for a tile's rows, ``u_stride(rank)`` apart.
static inline int64_t u_stride(int rank) { return (rank + 3) / 4 * 4; }

template <int DRAWS>
static inline void make_draws(const float **u, int rank, const Tile &tile, const lozo_call &call, FactorScratch *scratch) {
  const int64_t first = global_row(tile, 0);
  for (int d = 0; d < DRAWS; ++d) {
    u[d] = scratch->u[d];
    factor_floats(scratch->u[d], u_stride(rank), call.seed, call.draw_steps[d], call.directions[d], tile.tensor->tensor_id,
                  tile.rows, rank, [first](int64_t i) { return consecutive_counters((uint32_t)(first + i)); });
  }
}

// Updates a tile's rows of f, ``f_stride`` apart, and writes them to out, which may be f.
template <int DRAWS>
static inline void add_rows(float *out, int64_t out_stride, const float *f, int64_t f_stride, int rank, int64_t rows,
                            const float *const *made, const FactorArguments &a) {
  const float *u[LOZO_MAX_DRAWS];
  float scales[LOZO_MAX_DRAWS];
  for (int d = 0; d < DRAWS; ++d) u[d] = made[d], scales[d] = a.scales[d * a.scales_apart];
  if (f_stride == rank && out_stride == rank && u_stride(rank) == rank)
    return add_draws<DRAWS>(out, f, u, rows * rank, scales, a.decay);
  for (int64_t i = 0; i < rows; ++i, out += out_stride, f += f_stride) {
    add_draws<DRAWS>(out, f, u, rank, scales, a.decay);
    for (int d = 0; d < DRAWS; ++d) u[d] += u_stride(rank);
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
