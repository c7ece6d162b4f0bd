// F <- decay * F + sum over draws of scale * U.
#include "factor_rows.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  float *f = (float *)tile.tensor->x + weight_offset(tile, 0);
  const int64_t stride = tile.tensor->row_stride;
  const int rank = (int)tile.cols;
  for_draws(op.call->num_draws, [&](auto draws, int64_t first) {
    const float *u[LOZO_MAX_DRAWS];
    make_draws<draws>(u, rank, tile, *op.call, (FactorScratch *)scratch, first);
    add_rows<draws>(f, stride, f, stride, rank, tile.rows, u, scales_of(tile, op, first));
  });
}

}  // namespace

int factor_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile(
      {tensors, count, call->threads, kRowGrain, false, sizeof(FactorScratch), update_tile, &op, nullptr, call->num_draws});
}

}  // namespace LOZO_ISA
}  // namespace lozo
