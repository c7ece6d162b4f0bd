// N <- beta * N + sum over draws of coefficient * U, then F <- decay * F + sum of scale * U + alpha * N.
#include "factor_rows.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

LOZO_INLINE void add_momentum(float *f, const float *n, int64_t count, float alpha) {
  int64_t i = 0;
  for (; i + W <= count; i += W) store(f + i, add(load(f + i), mul(load(n + i), splat(alpha))));
  for (; i < count; ++i) f[i] = f[i] + n[i] * alpha;
}

void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  const lozo_call &call = *op.call;
  const int rank = (int)tile.cols;
  const int64_t stride = tile.tensor->row_stride;
  float *f = (float *)tile.tensor->x + weight_offset(tile, 0), *n = (float *)tile.tensor->n + dense_offset(tile, 0);
  for_draws(call.num_draws, [&](auto draws, int64_t first) {
    const float *u[LOZO_MAX_DRAWS], *coefficients = call.coefficients + first * op.count + tile.index;
    make_draws<draws>(u, rank, tile, call, (FactorScratch *)scratch, first);
    add_rows<draws>(n, rank, n, rank, rank, tile.rows, u, {coefficients, op.count, first == 0 ? call.beta[tile.index] : 1.0f});
    add_rows<draws>(f, stride, f, stride, rank, tile.rows, u, scales_of(tile, op, first));
  });
  const int64_t rows = stride == rank ? 1 : tile.rows, length = stride == rank ? tile.rows * rank : rank;
  for (int64_t i = 0; i < rows; ++i) add_momentum(f + i * stride, n + i * rank, length, call.alpha[tile.index]);
}

}  // namespace

int factor_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile(
      {tensors, count, call->threads, kRowGrain, false, sizeof(FactorScratch), update_tile, &op, nullptr, call->num_draws});
}

}  // namespace LOZO_ISA
}  // namespace lozo
