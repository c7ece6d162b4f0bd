// How a table of tensors is cut into tiles. Compiled once, for all instruction sets.
#ifndef LOZO_TILES_H
#define LOZO_TILES_H

#include <stddef.h>
#include <stdint.h>

#include "lozo/abi.h"

namespace lozo {

// A rectangle of one matrix, in local rows and columns.
struct Tile {
  const lozo_tensor *tensor;
  const lozo_tensor *out;  // the tensor whose weights are written
  int64_t index;           // index of the tensor in the table
  int64_t matrix;
  int64_t row, rows;
  int64_t col, cols;
};

struct Grain {
  int64_t min_rows, max_rows;  // of a tile, unless the matrix has fewer
  bool split_columns;          // otherwise every tile spans all columns
};

// The rows of U and columns of V of a tile cost something once. These extents amortise that, and bound the scratch memory.
constexpr int64_t kMaxTileRows = 256;
constexpr Grain kMatrixGrain = {64, kMaxTileRows, true};
constexpr Grain kRowGrain = {kMaxTileRows, kMaxTileRows, false};
constexpr Grain kFlatGrain = {1, INT64_MAX, true};
constexpr Grain kWholeGrain = {INT64_MAX, INT64_MAX, false};

struct Work {
  const lozo_tensor *tensors;
  int64_t count;
  int64_t threads;
  Grain grain;
  bool flatten;  // dense ops: a tensor without gaps is one long row
  size_t scratch_bytes;
  void (*tile)(const Tile &tile, char *scratch, const void *context);
  const void *context;
  const lozo_tensor *out = nullptr;  // the tensors whose weights are written, if they are others
  int64_t weight = 1;                // how many times as long as usual an element takes
};

// Runs work.tile on every tile, in any order and on any thread. Returns a lozo_status.
int for_each_tile(const Work &work);

// Whether a call's rank, draws and dtypes are within what the kernels assume.
bool valid_call(const lozo_tensor *tensors, int64_t count, const lozo_call *call, bool low_rank);

// Whether a call has one draw, and scales for so many parts of a batch as the kernels can take.
bool has_parts(const lozo_call *call);

// Whether all tensors are fp32 factors with a supported rank.
bool are_factors(const lozo_tensor *tensors, int64_t count);

// Whether a product's rank, dtype of y, tokens and place in the noise are within what the kernels assume.
bool valid_skinny(const lozo_skinny *call);

// Whether the dtypes and extents of a product at several points are within what the kernels assume, and all directions exist.
bool valid_points(const lozo_points *call);

static inline bool is_dtype(int64_t code) { return code >= LOZO_FLOAT32 && code <= LOZO_FLOAT16; }

// The global row of a tile's row i, and the global flat index of that row's first element in the tile.
static inline int64_t global_row(const Tile &t, int64_t i) { return t.tensor->row_offset + t.matrix * t.tensor->rows + t.row + i; }
static inline int64_t global_element(const Tile &t, int64_t i) {
  return global_row(t, i) * t.tensor->global_cols + t.tensor->col_offset + t.col;
}
// The position of that element in x, in the x that is written, and in a contiguous tensor of the same shape.
static inline int64_t weight_offset(const Tile &t, int64_t i) {
  return t.matrix * t.tensor->batch_stride + (t.row + i) * t.tensor->row_stride + t.col;
}
static inline int64_t out_offset(const Tile &t, int64_t i) {
  return t.matrix * t.out->batch_stride + (t.row + i) * t.out->row_stride + t.col;
}
static inline int64_t dense_offset(const Tile &t, int64_t i) {
  return (t.matrix * t.tensor->rows + t.row + i) * t.tensor->cols + t.col;
}

}  // namespace lozo

#endif
