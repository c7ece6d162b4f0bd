// X <- decay * X + sum over draws of scale * Z.
#include "dense_rows.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

void update_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  if (op.call->num_draws == 1) return update_dense_tile<1, Kept::kNone>(tile, op, (float *)scratch);
  return update_dense_tile<2, Kept::kNone>(tile, op, (float *)scratch);
}

}  // namespace

int dense_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  return update_dense(tensors, count, call, update_tile);
}

}  // namespace LOZO_ISA
}  // namespace lozo
