// Rows of a factor, or of a momentum N: decay, then U of each draw.
#ifndef LOZO_FACTOR_ROWS_H
#define LOZO_FACTOR_ROWS_H

#include <type_traits>

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

// Of the draws from ``first`` on. The factor decays with the first of all draws.
static inline FactorArguments scales_of(const Tile &tile, const OpCall &op, int64_t first) {
  const float *decay = first == 0 ? op.call->decay : nullptr;
  return {op.call->scales + first * op.count + tile.index, op.count, decay ? decay[tile.index] : 1.0f};
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

// U in fp32 at rank 2, which leaves half of every block of noise: out[row * 2 + k], from global row ``first``. Rows up to a
// multiple of 2 W are written.
static inline void factor_floats_of_two(float *out, uint64_t seed, int64_t draw, int64_t direction, int64_t tensor_id,
                                        uint64_t first, int64_t rows) {
  constexpr int kBlocks = W == 16 ? 4 : 2;  // side by side, which only so many registers hold
  const F unit = splat(kGridStep);
  const Counters s = make_counters(seed, direction_word(0, direction), (uint32_t)tensor_id, draw_word(kStreamU, draw));
  for (int64_t i = 0; i < rows; i += kBlocks * kCounters) {
    L c0[kBlocks];
    Words x[kBlocks];
    for (int b = 0; b < kBlocks; ++b) c0[b] = consecutive_counters((uint32_t)(first + (uint64_t)i) + (uint32_t)(b * kCounters));
    philox(x, s, c0);
    for (int b = 0; b < kBlocks; ++b)
      store(out + 2 * (i + b * kCounters), mul(to_float(normal_steps(zip(x[b].w[0], x[b].w[1]))), unit));
  }
}

// U of each draw for a tile's rows, ``u_stride(rank)`` apart.
static inline int64_t u_stride(int rank) { return rank == 2 ? 2 : (rank + 3) / 4 * 4; }

// U of the draws from ``from`` on.
template <int DRAWS>
static inline void make_draws(const float **u, int rank, const Tile &tile, const lozo_call &call, FactorScratch *scratch,
                              int64_t from = 0) {
  const int64_t first = global_row(tile, 0), id = tile.tensor->tensor_id;
  for (int d = 0; d < DRAWS; ++d) {
    u[d] = scratch->u[d];
    const int64_t step = call.draws ? call.draws[2 * (from + d)] : call.draw_steps[from + d];
    const int64_t direction = call.draws ? call.draws[2 * (from + d) + 1] : call.directions[from + d];
    if (rank == 2)
      factor_floats_of_two(scratch->u[d], call.seed, step, direction, id, (uint64_t)first, tile.rows);
    else
      factor_floats(scratch->u[d], u_stride(rank), call.seed, step, direction, id, tile.rows, rank,
                    [first](int64_t i) { return consecutive_counters((uint32_t)(first + i)); });
  }
}

// Calls add(a number of draws as a type, the first of them) for all draws in order, so many of them at once as there is scratch
// for.
template <class Add>
static inline void for_draws(int64_t count, Add add) {
  int64_t first = 0;
  for (; first + LOZO_MAX_DRAWS <= count; first += LOZO_MAX_DRAWS) add(std::integral_constant<int, LOZO_MAX_DRAWS>(), first);
  for (; first < count; ++first) add(std::integral_constant<int, 1>(), first);
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
