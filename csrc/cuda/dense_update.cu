// X <- decay * X + sum over draws of scale * Z.
#include "dense.h"

namespace lozo {

template <class T, int DRAWS, bool SIGNS>
static __global__ void __launch_bounds__(kDenseThreads, 5 - DRAWS) dense_update_aligned(const Launch launch) {
  update_dense_aligned<T, false, SIGNS, DRAWS>(launch);
}

template <bool SIGNS>
static __global__ void __launch_bounds__(kDenseThreads) dense_update_any(const Launch launch) {
  update_dense_any<false, SIGNS>(launch);
}

using Kernel = void (*)(Launch);

template <bool SIGNS>
static Kernel choose_kernel(int64_t dtype, int64_t draws) {
  if (dtype == LOZO_ANY_DTYPE) return dense_update_any<SIGNS>;
  return for_dtype(dtype, [=](auto element) -> Kernel {
    using T = decltype(element);
    return draws == 1 ? dense_update_aligned<T, 1, SIGNS> : dense_update_aligned<T, 2, SIGNS>;
  });
}

}  // namespace lozo

int lozo_cuda_dense_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, false)) return LOZO_BAD_ARGUMENT;
  const auto choose = call->law == LOZO_RADEMACHER ? lozo::choose_kernel<true> : lozo::choose_kernel<false>;
  return lozo::run_tiles(choose(tiles->dtype, call->num_draws), lozo::kDenseThreads, tiles, call);
}
