// U, V or S by itself, fp32 (rows, rank). The other ops regenerate it inside.
#include "launch.h"

namespace lozo {

constexpr int kFactorThreads = 256;

struct FactorLaunch {
  lozo_factor factor;
  float *out;
};

// A thread makes four columns of a row.
static __global__ void __launch_bounds__(kFactorThreads) factor_values_of_rows(const FactorLaunch launch) {
  const lozo_factor &f = launch.factor;
  const int rank = (int)f.rank, groups = (rank + 3) / 4;
  const int64_t i = (int64_t)blockIdx.x * kFactorThreads + threadIdx.x, row = i / groups;
  const int group = (int)(i % groups);
  if (row >= f.rows) return;
  const Noise noise = {f.seed, (uint32_t)f.direction << 8, (uint32_t)f.tensor_id, draw_word((Stream)f.stream, f.draw)};
  float z[4];
  factor_values(z, noise, (uint32_t)(f.row_offset + row), group);
  LOZO_UNROLL
  for (int k = 0; k < 4; ++k)
    if (4 * group + k < rank) store_global(launch.out + row * rank + 4 * group + k, z[k]);
}

}  // namespace lozo

int lozo_cuda_factor(const lozo_factor *factor, float *out, int64_t device, void *stream) {
  if (factor->rank < 1 || factor->rank > LOZO_MAX_RANK || factor->rows < 0) return LOZO_BAD_ARGUMENT;
  const int64_t work = factor->rows * ((factor->rank + 3) / 4), blocks = (work + lozo::kFactorThreads - 1) / lozo::kFactorThreads;
  if (blocks > INT32_MAX) return LOZO_BAD_ARGUMENT;
  const int error =
      run_kernel(lozo::factor_values_of_rows, blocks, lozo::kFactorThreads, lozo::FactorLaunch{*factor, out}, device, stream);
  return error ? LOZO_CUDA_ERROR + error : LOZO_OK;
}
