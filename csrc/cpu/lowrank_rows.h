// A few rows of X at once: decay, then U V^T of each draw from int16 pairs, whose int32 sums are exact; and C V^T of any C in fp32.
#ifndef LOZO_LOWRANK_ROWS_H
#define LOZO_LOWRANK_ROWS_H

#include "lozo/abi.h"
#include "panel.h"

namespace lozo {
namespace LOZO_ISA {

// U of some rows, and the factor of the product. Rows that share a panel's registers lie ``apart`` rows from each other, which is a
// fourth of the tile: then every stream of X continues from row to row, and hardware prefetchers follow it. Streams of neighbouring
// rows would jump at the end of each row.
struct RowFactors {
  const int32_t *u;  // int16 pairs: u[draw * draw_stride + pair * pair_stride + row * apart]
  int64_t apart;
  int64_t draw_stride, pair_stride;
  int pairs;
  float unit;  // 2^-16, or 1 if it is folded into the scales
  float scales[LOZO_MAX_DRAWS];
  float decay;
};

// Products count steps of 2^-16. Folding that into the scale is exact unless the scale is close to the denormals.
LOZO_INLINE bool fold_unit(RowFactors &f, int draws) {
  bool exact = true;
  for (int d = 0; d < draws; ++d) {
    const float magnitude = f.scales[d] < 0 ? -f.scales[d] : f.scales[d];
    if (magnitude < 0x1p-100f && magnitude != 0) exact = false;
  }
  if (exact) {
    for (int d = 0; d < draws; ++d) f.scales[d] *= f.unit;
    f.unit = 1.0f;
  }
  return exact;
}

// y += scale * U V^T for one block of columns; PAIRS = 0 serves any rank and any scale.
template <int PAIRS, int DRAWS, int ROWS, class LoadU>
LOZO_INLINE void add_products(Pair<F> *y, const int32_t *panel, const RowFactors &f, LoadU load_u) {
  Pair<I> sum[DRAWS][ROWS];
  for (int d = 0; d < DRAWS; ++d)
    for (int r = 0; r < ROWS; ++r) sum[d][r] = {zero_int(), zero_int()};
  const int pairs = PAIRS ? PAIRS : f.pairs;
  for (int p = 0; p < pairs; ++p) {
    const Pair<I> v = {load_int(panel + p * kBlock), load_int(panel + p * kBlock + W)};
    for (int d = 0; d < DRAWS; ++d)
      for (int r = 0; r < ROWS; ++r) {
        const I u = load_u(d, p, r);
        sum[d][r].a = dot_pairs(sum[d][r].a, u, v.a);
        sum[d][r].b = dot_pairs(sum[d][r].b, u, v.b);
      }
  }
  for (int d = 0; d < DRAWS; ++d) {
    const F scale = splat(f.scales[d]);
    for (int r = 0; r < ROWS; ++r) {
      Pair<F> product = {to_float(sum[d][r].a), to_float(sum[d][r].b)};
      if (!PAIRS) product = {mul(product.a, splat(f.unit)), mul(product.b, splat(f.unit))};
      y[r] = {add(y[r].a, mul(product.a, scale)), add(y[r].b, mul(product.b, scale))};
    }
  }
}

// sum <- C V^T for one block of columns, k ascending: a rounded product, then a fused multiply-add for each other k.
template <int RANK, int ROWS, class LoadC>
LOZO_INLINE void multiply_factor(Pair<F> *sum, const float *panel, int any_rank, LoadC load_c) {
  const int rank = RANK ? RANK : any_rank;
  for (int k = 0; k < rank; ++k) {
    const Pair<F> v = {load(panel + k * kBlock), load(panel + k * kBlock + W)};
    for (int r = 0; r < ROWS; ++r) {
      const F c = load_c(r, k);
      sum[r] = k == 0 ? Pair<F>{mul(c, v.a), mul(c, v.b)} : Pair<F>{fma(c, v.a, sum[r].a), fma(c, v.b, sum[r].b)};
    }
  }
}

constexpr int64_t kAhead = 1024;  // bytes: some hundred nanoseconds of a core's share of memory speed

// Asks for the block of every row that lies kAhead further on. Hardware prefetchers lose the thread where work on a block is long.
template <class T, int ROWS>
LOZO_INLINE void prefetch_rows(const T *x, int64_t stride) {
  for (int r = 0; r < ROWS; ++r) prefetch_blocks<1>(x + r * stride, kAhead);
}

// A decay of 1 changes nothing, so that a pass over weights, which waits for memory, need not be compiled without.
template <class T, int ROWS, bool DECAY>
LOZO_INLINE void load_rows(Pair<F> *y, const T *x, int64_t stride, int64_t count, F decay) {
  for (int r = 0; r < ROWS; ++r) {
    y[r] = count >= kBlock ? Io<T>::load(x + r * stride) : load_partial(x + r * stride, count);
    if (DECAY) y[r] = {mul(y[r].a, decay), mul(y[r].b, decay)};
  }
}

// FLUSHING is for results that are not promised in bits.
template <class T, int ROWS, bool FLUSHING = false>
LOZO_INLINE void store_rows(T *x, int64_t stride, const Pair<F> *y, int64_t count) {
  for (int r = 0; r < ROWS; ++r) {
    if (count < kBlock) {
      store_partial(x + r * stride, y[r], count);
    } else if (FLUSHING) {
      store_flushing(x + r * stride, y[r]);
    } else {
      Io<T>::store(x + r * stride, y[r]);
    }
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
