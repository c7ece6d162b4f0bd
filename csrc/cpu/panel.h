// V of a range of columns, unpacked from fp16 into the form that the kernels read: blocks of 2 W columns, in the order of the
// weight's Io, and within a block all ranks. Factors that are fp32 and given by ranks, as V is, are brought into the same form.
#ifndef LOZO_PANEL_H
#define LOZO_PANEL_H

#include "lozo/vec.h"

namespace lozo {
namespace LOZO_ISA {

LOZO_INLINE Pair<I> load_block_steps(const f16 *v, int64_t count) {
  if (count >= kBlock) return {load_steps(v), load_steps(v + W)};
  f16 block[kBlock] = {};
  memcpy(block, v, count * sizeof(f16));
  return {load_steps(block), load_steps(block + W)};
}

// panel[(block * pairs + pair) * kBlock]: int16 pairs of neighbouring ranks in steps of 2^-8, zero beyond rank and cols.
static inline void build_pair_panel(int32_t *panel, bool interleaved, const f16 *v, int64_t v_stride, int rank, int64_t cols) {
  const int pairs = (rank + 1) / 2;
  for (int64_t j = 0; j < cols; j += kBlock) {
    for (int p = 0; p < pairs; ++p, panel += kBlock) {
      const f16 *column = v + 2 * p * v_stride + j;
      const Pair<I> lo = load_block_steps(column, cols - j);
      Pair<I> hi = {zero_int(), zero_int()};
      if (2 * p + 1 < rank) hi = load_block_steps(column + v_stride, cols - j);
      Pair<I> x = {pack_pairs(lo.a, hi.a), pack_pairs(lo.b, hi.b)};
      if (interleaved) x = deinterleave(x);
      store_int(panel, x.a);
      store_int(panel + W, x.b);
    }
  }
}

// panel[(block * rank + k) * kBlock]: V in fp32, zero beyond cols.
template <class T>
static inline void build_float_panel(float *panel, bool interleaved, const T *v, int64_t v_stride, int rank, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kBlock) {
    for (int k = 0; k < rank; ++k, panel += kBlock) {
      const T *column = v + k * v_stride + j;
      Pair<F> x = cols - j >= kBlock ? Io<T>::load(column) : load_partial(column, cols - j);
      if (interleaved) x = deinterleave(x);
      Io<float>::store(panel, x);
    }
  }
}

}  // namespace LOZO_ISA
}  // namespace lozo

#endif
