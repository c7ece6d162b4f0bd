// M <- beta * M + sum of coefficient * Z, then X <- decay * X + sum of scale * Z + alpha * M.
#include "dense.h"

namespace lozo {

template <class T, int DRAWS>
static __global__ void __launch_bounds__(kDenseThreads, 5 - DRAWS) dense_momentum_aligned(const Launch launch) {
  update_dense_aligned<T, true, DRAWS>(launch);
}

static __global__ void __launch_bounds__(kDenseThreads) dense_momentum_any(const Launch launch) { update_dense_any<true>(launch); }

using Kernel = void (*)(Launch);

static Kernel choose_kernel(int64_t dtype, int64_t draws) {
  if (dtype == LOZO_ANY_DTYPE) return dense_momentum_any;
  return for_dtype(dtype, [=](auto element) -> Kernel {
    using T = decltype(element);
    return draws == 1 ? dense_momentum_aligned<T, 1> : dense_momentum_aligned<T, 2>;
  });
}

}  // namespace lozo

int lozo_cuda_dense_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, false)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::choose_kernel(tiles->dtype, call->num_draws), lozo::kDenseThreads, tiles, call);
}
