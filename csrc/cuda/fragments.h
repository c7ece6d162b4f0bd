// Low-rank products on tensor cores, without shared memory. The operands of mma.m16n8k16 may be permuted freely: a sum over k is
// exact in any order, and columns do not mix. The maps are chosen such that every thread makes its operands itself, and gets its
// results for the weights that it holds:
//
//   k        the thread with quad q (its lane modulo 4) takes k = 4 q .. 4 q + 3 of a row of U or N: the values of one Philox
//   counter; columns  column 2 q + i of the j-th of four results is the thread's element 2 j + i of eight that it loads 128 bits at
//   a time.
//
// A warp works on groups of 16 rows and 32 columns. A thread has the rows ``row`` and ``row + 8`` and eight columns.
#ifndef LOZO_CUDA_FRAGMENTS_H
#define LOZO_CUDA_FRAGMENTS_H

#include "element.h"
#include "rounding.h"
#include "tile.h"

namespace lozo {

constexpr int kWarps = 4, kWarpThreads = 32, kThreads = kWarps * kWarpThreads;
constexpr int kGroupRows = 16, kGroupCols = 32, kGroupRanks = 16;

struct Lane {
  int warp, row, quad;
};

LOZO_DEVICE Lane this_lane() {
  const int thread = (int)threadIdx.x, lane = thread % kWarpThreads;
  return {thread / kWarpThreads, lane / 4, lane % 4};
}

// Where piece ``p`` of a thread's eight columns starts within its group, for the thread with quad ``quad``.
template <class T>
LOZO_DEVICE int piece_column(int p, int quad) {
  return 16 * p + kPieceSize<T> * quad;
}

template <class T>
LOZO_DEVICE void load_eight(Eight<T> &x, const T *group, const Lane &lane, bool row_is_in, int cols_left) {
  LOZO_UNROLL
  for (int p = 0; p < kPieces<T>; ++p) {
    const int col = piece_column<T>(p, lane.quad);
    x.pieces[p] = make_uint4(0, 0, 0, 0);
    if (row_is_in && col < cols_left) x.pieces[p] = load_global((const uint4 *)(group + col));
  }
}

template <class T>
LOZO_DEVICE void store_eight(T *group, const Eight<T> &x, const Lane &lane, bool row_is_in, int cols_left) {
  LOZO_UNROLL
  for (int p = 0; p < kPieces<T>; ++p) {
    const int col = piece_column<T>(p, lane.quad);
    if (row_is_in && col < cols_left) store_global((uint4 *)(group + col), x.pieces[p]);
  }
}

// Eight columns of one row of V as pairs of fp16, in the layout of a thread's elements of T; zero outside of V.
template <class T>
LOZO_DEVICE void load_columns(uint32_t (&w)[4], const uint16_t *group, int quad, bool rank_is_in, int cols_left) {
  w[0] = w[1] = w[2] = w[3] = 0;
  LOZO_UNROLL
  for (int p = 0; p < kPieces<T>; ++p) {
    const int col = piece_column<T>(p, quad);
    if (!rank_is_in || col >= cols_left) continue;
    if constexpr (kPieces<T> == 1) {
      const uint4 v = load_global((const uint4 *)(group + col));
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    } else {
      const uint2 v = load_global((const uint2 *)(group + col));
      w[2 * p] = v.x, w[2 * p + 1] = v.y;
    }
  }
}

// V of a group's columns: the second operands of its four results, over STEPS times 16 ranks.
template <int STEPS>
struct Columns {
  uint32_t b[4][STEPS][2];
};

template <class T, int STEPS>
LOZO_DEVICE void load_fragments(Columns<STEPS> &f, const uint16_t *group, int64_t stride, int rank, const Lane &lane,
                                int cols_left) {
  // Column n of result j is element 2 j + n % 2 of the eight of quad n / 2. This thread gives column n = lane.row.
  const uint32_t which = lane.row % 2 ? 0x7632u : 0x5410u;
  int k = 4 * lane.quad;
  const uint16_t *v = group + k * stride;
  LOZO_UNROLL
  for (int s = 0; s < STEPS; ++s) {
    uint32_t w[4][4];
    LOZO_UNROLL
    for (int i = 0; i < 4; ++i, v = made_here(v + stride)) load_columns<T>(w[i], v, lane.row / 2, k + i < rank, cols_left);
    LOZO_UNROLL
    for (int j = 0; j < 4; ++j) {
      f.b[j][s][0] = select_bytes(w[0][j], w[1][j], which);
      f.b[j][s][1] = select_bytes(w[2][j], w[3][j], which);
    }
    if (STEPS == 4) loads_end_here();  // otherwise all loads would start at once, into 64 registers
    k += kGroupRanks, v += (kGroupRanks - 4) * stride;
  }
}

// U or N of a group's rows: the first operand.
template <int STEPS>
struct Rows {
  uint32_t a[STEPS][4];
};

// The two halves of values 4 quad .. 4 quad + 3 of row ``half`` of the thread's two.
template <int STEPS>
LOZO_DEVICE void set_row(Rows<STEPS> &f, int step, int half, const float (&z)[4]) {
  f.a[step][half] = pack_f16(z[0], z[1]);
  f.a[step][2 + half] = pack_f16(z[2], z[3]);
}

// U of the thread's rows, the first of which has the global number ``row``. Ranks beyond the last multiply a zero of V.
template <int STEPS>
LOZO_DEVICE void make_rows(Rows<STEPS> &f, const Noise &noise, uint32_t row, int quad) {
  LOZO_UNROLL
  for (int s = 0; s < STEPS; ++s) {
    LOZO_UNROLL
    for (int half = 0; half < 2; ++half) {
      float z[4];
      factor_values(z, noise, row + 8 * half, 4 * s + quad);
      set_row(f, s, half, z);
    }
  }
}

// Result ``j`` of four: rows row and row + 8 of the thread's elements 2 j and 2 j + 1.
template <int STEPS>
LOZO_DEVICE void multiply(float (&c)[4], const Rows<STEPS> &rows, const Columns<STEPS> &columns, int j) {
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  LOZO_UNROLL
  for (int s = 0; s < STEPS; ++s) mma_m16n8k16(c, rows.a[s], columns.b[j][s]);
}

LOZO_DEVICE void multiply_add(float &y, float x, float scale) { y = LOZO_ADD(y, LOZO_MUL(x, scale)); }

// y + scale * product for the thread's elements.
template <int STEPS>
LOZO_DEVICE void add_product(float (&y)[2][8], const Rows<STEPS> &rows, const Columns<STEPS> &columns, float scale) {
  LOZO_UNROLL
  for (int j = 0; j < 4; ++j) {
    float c[4];
    multiply(c, rows, columns, j);
    LOZO_UNROLL
    for (int i = 0; i < 4; ++i) multiply_add(y[i / 2][2 * j + i % 2], c[i], scale);
  }
}

template <class T>
LOZO_DEVICE void unpack_scaled(float (&y)[8], const Eight<T> &x, float decay) {
  unpack(y, x);
  LOZO_UNROLL
  for (int i = 0; i < 8; ++i) y[i] = LOZO_MUL(y[i], decay);
}

// The tile's weights as a thread sees them: its first row and the first column of a group.
template <class T>
struct Weights {
  T *x;
  int64_t stride;
  uint64_t element;  // flat element of the noise
  int rows, cols;
};

template <class T>
LOZO_DEVICE Weights<T> weights_of(const Tile &tile, const Lane &lane) {
  const int64_t stride = tile.tensor->row_stride;
  return {(T *)tile.tensor->x + weight_offset(tile) + lane.row * stride, stride,
          (uint64_t)(global_element(tile) + lane.row * tile.tensor->global_cols), tile.rows - lane.row, tile.cols};
}

// The thread's elements of rows row, row + 8, .. of the tile and a group of columns. Addresses are computed one after the other
// when they are needed: kept for the next columns, they would fill as many registers as the weights.
template <class T, int GROUPS>
LOZO_DEVICE void load_weights(Eight<T> (&x)[GROUPS][2], const Weights<T> &w, int row, int col, const Lane &lane) {
  const T *p = w.x + row * w.stride + col;
  LOZO_UNROLL
  for (int g = 0; g < GROUPS; ++g) {
    LOZO_UNROLL
    for (int half = 0; half < 2; ++half, row += 8, p = made_here(p + 8 * w.stride))
      load_eight(x[g][half], p, lane, row < w.rows, w.cols - col);
  }
}

// The words of the rounding noise are read only when they are needed, which saves registers too.
template <class T>
LOZO_DEVICE void store_weights(T *p, const Weights<T> &w, float (&y)[2][8], int row, int col, const Lane &lane,
                               const Launch &launch, const Tile &tile) {
  LOZO_UNROLL
  for (int half = 0; half < 2; ++half, row += 8, p = made_here(p + 8 * w.stride)) {
    if constexpr (sizeof(T) == 2) {
      if (launch.call.rounding) {
        const uint64_t element = made_here(w.element) + row * tile.tensor->global_cols + col + piece_column<T>(0, lane.quad);
        round_eight<T>(y[half], rounding_noise(launch, tile), element);
      }
    }
    Eight<T> x;
    pack(x, y[half]);
    store_eight(p, x, lane, row < w.rows, w.cols - col);
  }
}

// choose(steps) for the number of 16-rank steps that hold a rank, as a compile-time constant.
template <int STEPS>
struct Steps {
  static constexpr int value = STEPS;
};
template <class Choose>
static auto for_steps(int64_t rank, Choose choose) -> decltype(choose(Steps<1>())) {
  if (rank <= 16) return choose(Steps<1>());
  return rank <= 32 ? choose(Steps<2>()) : choose(Steps<4>());
}

}  // namespace lozo

#endif
