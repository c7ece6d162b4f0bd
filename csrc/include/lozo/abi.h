// The C interface between Python and the kernels: raw pointers and sizes, which ops.py has checked before.
#ifndef LOZO_ABI_H
#define LOZO_ABI_H

#include <stdint.h>

#define LOZO_ABI_VERSION 8
#define LOZO_MAX_RANK 64
#define LOZO_MAX_DRAWS 2
#define LOZO_MAX_PARTS 256

#if defined(_WIN32)
#define LOZO_EXPORT __declspec(dllexport)
#else
#define LOZO_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum lozo_status { LOZO_OK = 0, LOZO_BAD_ARGUMENT = 1, LOZO_NO_MEMORY = 2, LOZO_NO_ISA = 3 };

enum lozo_dtype { LOZO_FLOAT32 = 0, LOZO_BFLOAT16 = 1, LOZO_FLOAT16 = 2 };

enum lozo_law { LOZO_NORMAL = 0, LOZO_RADEMACHER = 1 };

// One row of the int64 table that Python packs: a batch of (rows, cols) matrices and their place in the noise.
typedef struct lozo_tensor {
  int64_t x;             // address of the weights
  int64_t v;             // address of V, fp16 (batch, rank, cols); 0 for a dense tensor
  int64_t n;             // address of the momentum, fp32 (batch, rows, rank) or (batch, rows, cols); 0 without
  int64_t dtype;         // lozo_dtype of x
  int64_t batch;         // number of matrices
  int64_t rows;          // rows of each matrix
  int64_t cols;          // columns of each matrix, contiguous in x
  int64_t batch_stride;  // stride of x between matrices, in elements
  int64_t row_stride;    // stride of x between rows, in elements
  int64_t tensor_id;     // c2 of the noise counter
  int64_t row_offset;    // global index of the first row
  int64_t col_offset;    // global index of the first column
  int64_t global_cols;   // global number of columns
} lozo_tensor;

typedef struct lozo_call {
  uint64_t seed;
  int64_t rank;       // 0 for dense tensors
  int64_t num_draws;  // 1 or 2; 0 or 1 for a merge; any number where ``draws`` is given
  int64_t draw_steps[LOZO_MAX_DRAWS];
  int64_t directions[LOZO_MAX_DRAWS];
  int64_t rounding;  // 1: stochastic into bf16 and fp16, 0: to nearest even
  int64_t rounding_step;
  int64_t rounding_index;
  const float *scales;        // (draws, tensors), or (parts, tensors)
  const float *coefficients;  // (draws, tensors), momentum ops only
  const float *alpha;         // (tensors,), momentum ops only
  const float *beta;          // (tensors,), momentum ops only
  const float *decay;         // (tensors,), or NULL for 1
  const lozo_tensor *out;     // merges only: the weights that are written, of which only x and its strides count
  int64_t reproject;          // resample only: N is carried over into the new V
  int64_t parts;              // lowrank_signed_update only: the parts of a batch, whose signs begin at directions[0]
  int64_t law;                // dense ops only: lozo_law of the noise
  const int64_t *draws;       // factor ops only: (num_draws, 2): step, direction; NULL: those of draw_steps and directions
  int64_t threads;
} lozo_call;

// A product of activations with a weight's factors, as LayerCall of calls.py describes it. Unit column strides.
typedef struct lozo_skinny {
  void *y;               // (tokens, rows), or (tokens, cols) if transposed or looked up
  const void *x;         // (tokens, cols), or (tokens, rows) if transposed; for a look-up (tokens,) row indices
  const void *v;         // (rank, cols) fp16
  const float *b;        // (rows, rank)
  const int64_t *draws;  // (groups, 2): step, direction
  const float *scales;   // (groups,)
  const float *gain;     // (1,), or NULL for 1
  const float *shift;    // (groups, columns of y), or NULL for 0
  uint64_t seed;
  int64_t tensor_id;
  int64_t row_offset;
  int64_t y_dtype;   // lozo_dtype
  int64_t x_dtype;   // lozo_dtype; for a look-up the bytes of an index, 4 or 8
  int64_t y_stride;  // between rows, in elements
  int64_t x_stride;
  int64_t tokens;  // in equal blocks, one for each group
  int64_t groups;
  int64_t rows;
  int64_t cols;
  int64_t rank;
  int64_t transposed;
  int64_t threads;
} lozo_skinny;

// A product of activations at several points with a weight's factors, as PointsCall of calls.py describes it. Unit column strides.
typedef struct lozo_points {
  void *y;                    // (tokens, rows), or (tokens, cols) if transposed
  const void *x;              // (tokens, cols), or (tokens, rows) if transposed
  const float *v;             // (ranks, cols)
  const float *b;             // (ranks, rows)
  const float *u;             // (count, rank, rows), or NULL
  const int64_t *directions;  // (tokens,), not read without u
  const float *scales;        // (tokens,), not read without u
  const float *gain;          // (1,), or NULL for 1
  int64_t y_dtype;            // lozo_dtype
  int64_t x_dtype;            // lozo_dtype
  int64_t y_stride;           // between rows, in elements
  int64_t x_stride;
  int64_t tokens;
  int64_t rows;
  int64_t cols;
  int64_t ranks;
  int64_t count;  // directions
  int64_t rank;   // of a direction: the first ranks of V
  int64_t transposed;
  int64_t threads;
} lozo_points;

// A factor of the noise contract, as noise.factor describes it.
typedef struct lozo_factor {
  uint64_t seed;
  int64_t stream;  // 0 U, 1 V, 3 S
  int64_t tensor_id;
  int64_t draw;
  int64_t direction;
  int64_t row_offset;
  int64_t rows;
  int64_t rank;
} lozo_factor;

// For each op of LOZO_TABLE_OPS (cpu/ops.h) there is
//   int lozo_cpu_<op>(const lozo_tensor *tensors, int64_t count, const lozo_call *call);
// which returns a lozo_status, and changes nothing unless it is LOZO_OK. Of resample, draw_steps[0] is the window; the tensors of
// factor_update and factor_momentum are fp32 factors themselves, (batch, rows, rank); out of a merge may be the tensors.
LOZO_EXPORT int lozo_cpu_lowrank_linear(const lozo_skinny *call);
LOZO_EXPORT int lozo_cpu_lowrank_embedding(const lozo_skinny *call);
LOZO_EXPORT int lozo_cpu_lowrank_points(const lozo_points *call);

// Writes fp32 (rows, rank) to out.
LOZO_EXPORT int lozo_cpu_factor(const lozo_factor *factor, float *out);

// Runs further calls on the threads of an OpenMP runtime that is loaded already, given the address of its GOMP_parallel. The
// caller's framework keeps them awake, and a second team would compete with them. With NULL, and after a fork, the library has its
// own threads.
LOZO_EXPORT void lozo_use_openmp(void *gomp_parallel);

LOZO_EXPORT int64_t lozo_abi_version(void);

// Instruction sets: the names of those compiled in, best first, separated by spaces; whether this machine runs one; the one in use.
LOZO_EXPORT const char *lozo_isa_list(void);
LOZO_EXPORT int lozo_isa_supported(const char *name);
LOZO_EXPORT const char *lozo_isa_name(void);
// Switches to an instruction set, or with NULL to the best supported one.
LOZO_EXPORT int lozo_set_isa(const char *name);

#ifdef __cplusplus
}
#endif

#endif
