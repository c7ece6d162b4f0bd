// M <- beta * M + sum of coefficient * Z, then X <- decay * X + sum of scale * Z + alpha * M.
#include "dense_rows.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  if (op.call->num_draws == 1) return update_dense_tile<1, Kept::kMomentum>(tile, op, (float *)scratch);
  return update_dense_tile<2, Kept::kMomentum>(tile, op, (float *)scratch);
}

}  // namespace

int dense_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  return update_dense(tensors, count, call, update_tile);
}

}  // namespace LOZO_ISA
}  // namespace lozo
