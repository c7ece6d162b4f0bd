// How a C call launches a kernel.
#ifndef LOZO_CUDA_LAUNCH_H
#define LOZO_CUDA_LAUNCH_H

#include "element.h"
#include "tile.h"

namespace lozo {

static inline bool valid_call(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call, bool low_rank, int64_t least_draws = 1) {
  if (tiles->count < 0 || tiles->count > INT32_MAX || call->num_draws < least_draws || call->num_draws > LOZO_MAX_DRAWS)
    return false;
  if (call->law != LOZO_NORMAL && call->law != LOZO_RADEMACHER) return false;
  if (low_rank && (call->rank < 1 || call->rank > LOZO_MAX_RANK)) return false;
  return tiles->dtype >= LOZO_ANY_DTYPE && tiles->dtype <= LOZO_FLOAT16;
}

static inline int run_tiles(void (*kernel)(Launch), int threads, const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  const int error = run_kernel(kernel, tiles->count, threads, Launch{*tiles, *call}, call->device, call->stream);
  return error ? LOZO_CUDA_ERROR + error : LOZO_OK;
}

// Returns choose(T()) for the C++ type T of a dtype.
template <class Choose>
static auto for_dtype(int64_t dtype, Choose choose) -> decltype(choose(float())) {
  if (dtype == LOZO_FLOAT32) return choose(float());
  return dtype == LOZO_BFLOAT16 ? choose(bf16()) : choose(f16());
}

}  // namespace lozo

#endif
