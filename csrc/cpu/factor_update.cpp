// F <- decay * F + sum over draws of scale * U.
#include "factor_rows.h"
#include "ops.h"
#include "tiles.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  const lozo_call &call = *op.call;
  float *f = (float *)tile.tensor->x + weight_offset(tile, 0);
  const int64_t stride = tile.tensor->row_stride;
  const FactorArguments a = {call.scales + tile.index, op.count, call.decay ? call.decay[tile.index] : 1.0f};
  const auto update = call.num_draws == 1 ? update_factor<1> : update_factor<2>;
  update(f, stride, f, stride, (int)tile.tensor->cols, tile, call, a, (FactorScratch *)scratch);
}

}  // namespace

int factor_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  const OpCall op = {call, count};
  return for_each_tile({tensors, count, call->threads, kRowGrain, false, sizeof(FactorScratch), update_tile, &op});
}

}  // namespace LOZO_ISA
}  // namespace lozo
