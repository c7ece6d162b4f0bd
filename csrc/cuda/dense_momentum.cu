// M <- beta * M + sum of coefficient * Z, then X <- decay * X + sum of scale * Z + alpha * M.
#include "dense.h"

namespace lozo {

template <class T, int DRAWS, bool SIGNS>
static __global__ void __launch_bounds__(kDenseThreads, 5 - DRAWS) dense_momentum_aligned(const Launch launch) {
  update_dense_aligned<T, true, SIGNS, DRAWS>(launch);
}

template <bool SIGNS>
static __global__ void __launch_bounds__(kDenseThreads) dense_momentum_any(const Launch launch) {
  update_dense_any<true, SIGNS>(launch);
}

using Kernel = void (*)(Launch);

template <bool SIGNS>
static Kernel choose_kernel(int64_t dtype, int64_t draws) {
  if (dtype == LOZO_ANY_DTYPE) return dense_momentum_any<SIGNS>;
  return for_dtype(dtype, [=](auto element) -> Kernel {
    using T = decltype(element);
    return draws == 1 ? dense_momentum_aligned<T, 1, SIGNS> : dense_momentum_aligned<T, 2, SIGNS>;
  });
}

}  // namespace lozo

int lozo_cuda_dense_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, false)) return LOZO_BAD_ARGUMENT;
  const auto choose = call->law == LOZO_RADEMACHER ? lozo::choose_kernel<true> : lozo::choose_kernel<false>;
  return lozo::run_tiles(choose(tiles->dtype, call->num_draws), lozo::kDenseThreads, tiles, call);
}
