// The C interface between Python and the CUDA kernels. Pointers are to memory of the device unless a comment says otherwise;
// lozo_kernels/kernels/backends/launches.py builds what they point to.
#ifndef LOZO_ABI_CUDA_H
#define LOZO_ABI_CUDA_H

#include "lozo/abi.h"

#define LOZO_CUDA_ABI_VERSION 4
#define LOZO_ANY_DTYPE (-1)

#ifdef __cplusplus
extern "C" {
#endif

// A status is a lozo_status, or LOZO_CUDA_ERROR plus a cudaError_t.
enum { LOZO_CUDA_ERROR = 1000 };

// The words of a header, which say which noise a launch makes.
enum lozo_header {
  LOZO_SEED_LOW,
  LOZO_SEED_HIGH,
  LOZO_DIRECTION_0,
  LOZO_DIRECTION_1,
  LOZO_ROUNDING_INDEX,
  LOZO_STEP_0,
  LOZO_STEP_1,
  LOZO_ROUNDING_STEP
};

// The tiles of one launch, one for each block: (count, 4) of tensor, matrix, first row, and first column divided by the columns of
// a tile. If tiles are of rows alone, the last number is the index of the matrix among those of all tensors.
typedef struct lozo_gpu_tiles {
  const int32_t *tiles;
  int64_t count;
  int64_t rows, cols;  // extents of a tile; 0: all of the matrix
  int64_t dtype;       // dtype of all tensors, whose accesses may then be 128 bits wide; or LOZO_ANY_DTYPE
} lozo_gpu_tiles;

typedef struct lozo_gpu_call {
  const lozo_tensor *tensors;
  const lozo_tensor *outputs;  // of a merge, the same with the addresses and strides of the weights that are written
  int64_t count;               // number of tensors
  const uint32_t *header;      // (8,)
  int64_t rank;                // 0 for dense tensors
  int64_t num_draws;           // 1 or 2; of a merge 0
  int64_t rounding;            // 1: stochastic into bf16 and fp16, 0: to nearest even
  int64_t law;                 // dense ops only: lozo_law of the noise
  const float *scales;         // (draws, tensors)
  const float *coefficients;
  const float *alpha;
  const float *beta;
  const float *decay;  // or NULL for 1
  float *ratios;       // for resample: (matrices, rank, rank), or NULL without re-projection
  int64_t device;
  void *stream;
} lozo_gpu_call;

// The ops of ops.py, one launch for each call. Each returns a status.
LOZO_EXPORT int lozo_cuda_lowrank_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
LOZO_EXPORT int lozo_cuda_dense_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
LOZO_EXPORT int lozo_cuda_dense_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
LOZO_EXPORT int lozo_cuda_lowrank_merge(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
// Over tiles of rows. The tensors are fp32 factors themselves, (batch, rows, rank).
LOZO_EXPORT int lozo_cuda_factor_update(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
LOZO_EXPORT int lozo_cuda_factor_momentum(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
// The first makes V and, if call->ratios is given, (V_old^T V_new) / cols, over whole matrices; the second applies the ratios to N,
// over tiles of rows.
LOZO_EXPORT int lozo_cuda_resample(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);
LOZO_EXPORT int lozo_cuda_reproject(const lozo_gpu_tiles *tiles, const lozo_gpu_call *call);

// Writes fp32 (rows, rank) to out. The factor's description is in host memory.
LOZO_EXPORT int lozo_cuda_factor(const lozo_factor *factor, float *out, int64_t device, void *stream);

LOZO_EXPORT int64_t lozo_cuda_abi_version(void);
// The compute capabilities that there is machine code for, times ten, ascending and separated by spaces. Devices newer than the
// last compile its PTX.
LOZO_EXPORT const char *lozo_cuda_architectures(void);
// Whether the kernels can run on a device, as a status.
LOZO_EXPORT int lozo_cuda_probe(int64_t device);
LOZO_EXPORT const char *lozo_cuda_message(int status);

#ifdef __cplusplus
}
#endif

#endif
