// V <- the V of a window; with re-projection also N <- N (V_old^T V_new) / cols, by way of the ratios (V_old^T V_new) / cols.
#include "launch.h"

namespace lozo {

constexpr int kResampleThreads = 256;
constexpr int kStaged = 2048;  // values of V in shared memory at once; few enough columns that int32 sums cannot overflow
constexpr int kMaxPairs = LOZO_MAX_RANK * LOZO_MAX_RANK;

// The part of V_old^T V_new that the staged columns add, in steps of 2^-16. If there are more threads than pairs of ranks, several
// share a pair's columns.
LOZO_DEVICE void add_to_gram(unsigned long long *gram, const int16_t *before, const int16_t *after, int rank, int cols) {
  const int pairs = rank * rank, slices = pairs < kResampleThreads ? kResampleThreads / pairs : 1;
  for (int i = (int)threadIdx.x; i < pairs * slices; i += kResampleThreads) {
    const int pair = i % pairs, slice = i / pairs;
    const int16_t *a = before + pair / rank * cols, *b = after + pair % rank * cols;
    int sum = 0;
    for (int j = slice; j < cols; j += slices) sum += a[j] * b[j];
    atomicAdd(gram + pair, (unsigned long long)(long long)sum);
  }
}

// Works on whole matrices, because the Gram matrix sums over all of their columns.
template <bool RATIOS>
static __global__ void __launch_bounds__(kResampleThreads) resample_factor(const Launch launch) {
  __shared__ unsigned long long gram[RATIOS ? kMaxPairs : 1];
  __shared__ int16_t before[RATIOS ? kStaged : 1], after[RATIOS ? kStaged : 1];
  const Tile tile = find_tile(launch);
  const lozo_tensor &tensor = *tile.tensor;
  const int rank = (int)launch.call.rank, groups = (rank + 3) / 4, chunk = kStaged / rank;
  uint16_t *v = (uint16_t *)tensor.v + tile.matrix * rank * tensor.cols;
  const Noise noise = draw_noise(launch, tile, kStreamV, 0);
  const int64_t global = tensor.col_offset + tile.matrix * tensor.global_cols;
  if (RATIOS)
    for (int i = (int)threadIdx.x; i < rank * rank; i += kResampleThreads) gram[i] = 0;
  for (int64_t first = 0; first < tensor.cols; first += chunk) {
    const int cols = extent(chunk, tensor.cols - first);
    for (int i = (int)threadIdx.x; i < cols * groups; i += kResampleThreads) {
      const int col = i % cols, group = i / cols;
      float z[4];
      factor_values(z, noise, (uint32_t)(global + first + col), group);
      LOZO_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int at = 4 * group + k;
        if (at >= rank) continue;
        uint16_t *value = v + at * tensor.cols + first + col;
        if (RATIOS) {
          before[at * cols + col] = (int16_t)LOZO_MUL(f16_to_float(load_global(value)), 256.0f);
          after[at * cols + col] = (int16_t)LOZO_MUL(z[k], 256.0f);
        }
        store_global(value, (uint16_t)pack_f16(z[k], 0.0f));
      }
    }
    if (RATIOS) {
      __syncthreads();
      add_to_gram(gram, before, after, rank, cols);
      __syncthreads();
    }
  }
  if (!RATIOS) return;
  float *ratios = launch.call.ratios + (int64_t)blockIdx.x * rank * rank;
  for (int i = (int)threadIdx.x; i < rank * rank; i += kResampleThreads)
    ratios[i] = (float)((double)(long long)gram[i] * 0x1p-16 / (double)tensor.cols);
}

// Works on tiles of rows: multiplies N by the ratios with k ascending, by fused multiply-adds after a rounded product.
static __global__ void __launch_bounds__(kResampleThreads) resample_momentum(const Launch launch) {
  __shared__ float before[kStaged];
  const Tile tile = find_tile(launch);
  const int rank = (int)launch.call.rank, chunk = kStaged / rank;
  const float *ratios = launch.call.ratios + tile.last * rank * rank;
  float *n = (float *)tile.tensor->n + (tile.matrix * tile.tensor->rows + tile.row) * rank;
  for (int first = 0; first < tile.rows; first += chunk, n += (int64_t)chunk * rank) {
    const int values = extent(chunk, tile.rows - first) * rank;
    for (int i = (int)threadIdx.x; i < values; i += kResampleThreads) before[i] = load_global(n + i);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < values; i += kResampleThreads) {
      const int row = i / rank, b = i % rank;
      float sum = -0.0f;  // with which the first is a rounded product
      for (int k = 0; k < rank; ++k) sum = LOZO_FMA(before[row * rank + k], ratios[k * rank + b], sum);
      store_global(n + i, sum);
    }
    __syncthreads();
  }
}

}  // namespace lozo

int lozo_cuda_resample(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true)) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(call->ratios ? lozo::resample_factor<true> : lozo::resample_factor<false>, lozo::kResampleThreads, tiles,
                         call);
}

int lozo_cuda_reproject(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call) {
  if (!lozo::valid_call(tiles, call, true) || !call->ratios) return LOZO_BAD_ARGUMENT;
  return lozo::run_tiles(lozo::resample_momentum, lozo::kResampleThreads, tiles, call);
}
