// M <- beta * M + sum of coefficient * Z, then X <- decay * X + sum of scale * Z + alpha * M.
#include "dense_rows.h"

namespace lozo {
namespace LOZO_ISA {

int dense_momentum(const lozo_tensor *tensors, int64_t count, const lozo_call *call) {
  return update_dense<true>(tensors, count, call);
}

}  // namespace LOZO_ISA
}  // namespace lozo
