// N V^T for a warp's rows and columns, in the layout of fragments.h. Up to rank 8 it has the promised bits; above, it is on tensor
// cores.
#ifndef LOZO_CUDA_MOMENTUM_PRODUCT_H
#define LOZO_CUDA_MOMENTUM_PRODUCT_H

#include "fragments.h"

namespace lozo {

constexpr int kExactRanks = 8;

// With k ascending: a rounded product, then a fused multiply-add for each other k.
template <class T>
struct ExactProduct {
  static constexpr int steps = 1, groups = 2;
  static constexpr int blocks = 4;  // blocks on a multiprocessor at once; one less with a second draw

  const float *n;
  int rank, rows;
  float sum[groups][2][8];

  // ``first``: the thread's first row of N, ``left`` the number of rows from there.
  LOZO_METHOD void take_rows(const float *first, int ranks, int left, const Lane &) { n = first, rank = ranks, rows = left; }

  LOZO_METHOD void take_columns(const uint16_t *group, int64_t stride, int cols_left, const Lane &lane) {
    LOZO_UNROLL
    for (int g = 0; g < groups; ++g) {
      LOZO_UNROLL
      for (int i = 0; i < 8; ++i) sum[g][0][i] = sum[g][1][i] = -0.0f;  // with which the first is a rounded product
    }
    LOZO_NO_UNROLL
    for (int k = 0; k < rank; ++k) {
      uint32_t w[4];
      load_columns<T>(w, group + k * stride, lane.quad, true, cols_left);
      float v[8];
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) v[2 * i] = low_half(f16(), w[i]), v[2 * i + 1] = high_half(f16(), w[i]);
      LOZO_UNROLL
      for (int g = 0; g < groups; ++g) {
        LOZO_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = kGroupRows * g + 8 * half;
          const float factor = row < rows ? load_global(n + (int64_t)row * rank + k) : 0.0f;
          LOZO_UNROLL
          for (int i = 0; i < 8; ++i) sum[g][half][i] = LOZO_FMA(factor, v[i], sum[g][half][i]);
        }
      }
    }
  }

  LOZO_METHOD void add_to(float (&y)[2][8], int g, const Columns<steps> &, float alpha) const {
    LOZO_UNROLL
    for (int i = 0; i < 8; ++i) y[0][i] = LOZO_FMA(sum[g][0][i], alpha, y[0][i]), y[1][i] = LOZO_FMA(sum[g][1][i], alpha, y[1][i]);
  }
};

// A row of N, scaled by a power of two to below 4, is split into high + low * 2^-11, both fp16, which keeps 22 bits of its largest
// value.
template <class T, int STEPS, int GROUPS>
struct SplitProduct {
  static constexpr int steps = STEPS, groups = GROUPS;
  static constexpr int blocks = STEPS == 1 ? 3 : 2;

  Rows<STEPS> high[GROUPS], low[GROUPS];
  float unit[GROUPS][2];

  LOZO_METHOD void take_rows(const float *first, int rank, int left, const Lane &lane) {
    LOZO_UNROLL
    for (int g = 0; g < GROUPS; ++g) {
      LOZO_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = kGroupRows * g + 8 * half;
        take_row(g, half, first + (int64_t)row * rank, row < left ? rank : 0, lane.quad);
      }
    }
  }

  LOZO_METHOD void take_row(int g, int half, const float *n, int rank, int quad) {
    float value[STEPS][4], largest = 0.0f;
    LOZO_UNROLL
    for (int s = 0; s < STEPS; ++s) {
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int k = kGroupRanks * s + 4 * quad + i;
        value[s][i] = k < rank ? load_global(n + k) : 0.0f;
        largest = fmaxf(largest, fabsf(value[s][i]));
      }
    }
    largest = fmaxf(largest, shuffle_xor(largest, 1));
    largest = fmaxf(largest, shuffle_xor(largest, 2));
    // Exponents for which both the scale and its reciprocal are normal numbers.
    const uint32_t exponent = bits_from_float(largest) >> 23, bound = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
    const float scale = float_from_bits((254 - bound) << 23);
    unit[g][half] = float_from_bits(bound << 23);
    LOZO_UNROLL
    for (int s = 0; s < STEPS; ++s) {
      float rest[4];
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) value[s][i] = LOZO_MUL(value[s][i], scale);
      set_row(high[g], s, half, value[s]);
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        const uint32_t pair = high[g].a[s][i < 2 ? half : 2 + half];
        rest[i] = LOZO_MUL(LOZO_ADD(value[s][i], -(i % 2 ? high_half(f16(), pair) : low_half(f16(), pair))), 0x1p11f);
      }
      set_row(low[g], s, half, rest);
    }
  }

  LOZO_METHOD void take_columns(const uint16_t *, int64_t, int, const Lane &) {}

  LOZO_METHOD void add_to(float (&y)[2][8], int g, const Columns<STEPS> &columns, float alpha) const {
    LOZO_UNROLL
    for (int j = 0; j < 4; ++j) {
      float sum[4], rest[4];
      multiply(sum, high[g], columns, j);
      multiply(rest, low[g], columns, j);
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) {
        float &value = y[i / 2][2 * j + i % 2];
        value = LOZO_FMA(LOZO_MUL(LOZO_FMA(rest[i], 0x1p-11f, sum[i]), unit[g][i / 2]), alpha, value);
      }
    }
  }
};

template <class T>
using SplitProduct16 = SplitProduct<T, 1, 2 / kPieces<T>>;
template <class T>
using SplitProduct32 = SplitProduct<T, 2, 1>;
template <class T>
using SplitProduct64 = SplitProduct<T, 4, 1>;

}  // namespace lozo

#endif
