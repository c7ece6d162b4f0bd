// X <- decay * X + sum over draws of scale * Z.
#include "dense_rows.h"

namespace lozo {
namespace LOZO_ISA {

int dense_update(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  return update_dense<false>(tensors, count, call);
}

}  // namespace LOZO_ISA
}  // namespace lozo
