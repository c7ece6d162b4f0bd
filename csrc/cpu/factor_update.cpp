// F <- decay * F + sum over draws of scale * U.
#include "factor_rows.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

template <int DRAWS>
void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  float *f = (float *)tile.tensor->x + weight_offset(tile, 0);
  const int64_t stride = tile.tensor->row_stride;
  const float *u[LOZO_MAX_DRAWS];
  make_draws<DRAWS>(u, (int)tile.cols, tile, *op.call, (FactorScratch *)scratch);
  add_rows<DRAWS>(f, stride, f, stride, (int)tile.cols, tile.rows, u, scales_of(tile, op));
}

}  // namespace

int factor_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  const auto tile = call->num_draws == 1 ? update_tile<1> : update_tile<2>;
  return for_each_tile({tensors, count, call->threads, kRowGrain, false, sizeof(FactorScratch), tile, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
