// OUT <- decay * X + (N + scale * Z), where N may be absent.
#include "dense_rows.h"

namespace lozo {
namespace LOZO_ISA {
namespace {

template <Kept KEPT>
void merge_tile(const Tile &tile, const OpCall &op, float *scratch) {
  if (op.call->num_draws == 0) return update_dense_tile<0, KEPT>(tile, op, scratch);
  return update_dense_tile<1, KEPT>(tile, op, scratch);
}

void merge_tile(const Tile &tile, char *scratch, const void *context) {
  const OpCall &op = *(const OpCall *)context;
  if (tile.tensor->n) return merge_tile<Kept::kMerged>(tile, op, (float *)scratch);
  return merge_tile<Kept::kNone>(tile, op, (float *)scratch);
}

}  // namespace

int dense_merge(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  return update_dense(tensors, count, call, merge_tile);
}

}  // namespace LOZO_ISA
}  // namespace lozo
