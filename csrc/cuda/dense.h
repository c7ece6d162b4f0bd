// The dense ops: decay, then the noise of each draw, then the momentum.
#ifndef LOZO_CUDA_DENSE_H
#define LOZO_CUDA_DENSE_H

#include "launch.h"
#include "rounding.h"

namespace lozo {

constexpr int kDenseThreads = 256;

template <int DRAWS>
struct DenseNumbers {
  Noise noise[DRAWS], rounding;
  RoundKeys keys;
  float scales[DRAWS], coefficients[DRAWS];
  float alpha, beta, decay;
  bool decays;
};

template <bool MOMENTUM, bool SIGNS, int DRAWS>
LOZO_DEVICE DenseNumbers<DRAWS> dense_numbers(const Launch &launch, const Tile &tile) {
  DenseNumbers<DRAWS> a = {};
  a.keys = make_keys(launch.call.header[LOZO_SEED_LOW] | (uint64_t)launch.call.header[LOZO_SEED_HIGH] << 32);
  LOZO_UNROLL
  for (int d = 0; d < DRAWS; ++d) {
    if (d >= launch.call.num_draws) continue;
    a.noise[d] = draw_noise(launch, tile, SIGNS ? kStreamSigns : kStreamZ, d);
    a.scales[d] = of_tensor(launch.call.scales, launch, tile, d);
    if (MOMENTUM) a.coefficients[d] = of_tensor(launch.call.coefficients, launch, tile, d);
  }
  a.rounding = rounding_noise(launch, tile);
  a.decays = launch.call.decay;
  a.decay = a.decays ? of_tensor(launch.call.decay, launch, tile) : 0.0f;
  if (MOMENTUM) a.alpha = of_tensor(launch.call.alpha, launch, tile), a.beta = of_tensor(launch.call.beta, launch, tile);
  return a;
}

LOZO_DEVICE uint32_t word_of(const uint32_t (&c)[4], int word) {
  return word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3];
}

// The signs of the elements from those of the counter ``quad`` on, as bits.
LOZO_DEVICE uint32_t sign_bits(const Noise &noise, const RoundKeys &keys, uint32_t quad, uint32_t high) {
  uint32_t c[4];
  noise_words(c, noise, keys, (uint32_t)(((uint64_t)high << 32 | quad) >> 5), high >> 5);
  return word_of(c, (int)(quad >> 3) & 3) >> 4 * (quad & 7);
}

LOZO_DEVICE float sign_of(uint32_t bits, int i) { return float_from_bits((bits << (31 - i) & 0x80000000u) | 0x3f800000u); }

// The noise of a thread's eight elements: two runs of four, which begin with the counters ``quad`` and ``other``.
template <bool SIGNS, bool ADJACENT>
LOZO_DEVICE void dense_eight(float (&z)[8], const Noise &noise, const RoundKeys &keys, uint32_t quad, uint32_t other,
                             uint32_t high) {
  if constexpr (SIGNS) {
    const uint32_t bits = sign_bits(noise, keys, quad, high);
    const uint32_t more = ADJACENT ? bits >> 4 : sign_bits(noise, keys, other, high);
    LOZO_UNROLL
    for (int i = 0; i < 4; ++i) z[i] = sign_of(bits, i), z[4 + i] = sign_of(more, i);
  } else {
    LOZO_UNROLL
    for (int run = 0; run < 2; ++run) {
      uint32_t c[4];
      noise_words(c, noise, keys, run ? other : quad, high);
      LOZO_UNROLL
      for (int i = 0; i < 4; ++i) z[4 * run + i] = normal(c[i]);
    }
  }
}

// The thread's eight elements, starting with counter ``quad``. In a half-precision type they are adjacent; in fp32 they are two
// runs of four, ``apart`` from each other.
template <class T, bool MOMENTUM, bool SIGNS, int DRAWS>
LOZO_DEVICE void update_eight(T *x, float *n, uint32_t quad, uint32_t high, int left, int apart, bool stochastic,
                              const DenseNumbers<DRAWS> &a) {
  const int second = kPieces<T> == 1 ? 4 : apart;
  const bool both = kPieces<T> == 1 || second < left;
  Eight<T> raw;
  uint4 momentum[2];
  LOZO_UNROLL
  for (int p = 0; p < kPieces<T>; ++p) {
    raw.pieces[p] = make_uint4(0, 0, 0, 0);
    if (p == 0 || both) raw.pieces[p] = load_global((const uint4 *)(x + p * second));
  }
  if (MOMENTUM) {
    momentum[0] = load_global((const uint4 *)n);
    momentum[1] = make_uint4(0, 0, 0, 0);
    if (both) momentum[1] = load_global((const uint4 *)(n + second));
  }
  float y[8], m[8];
  unpack(y, raw);
  if (a.decays) {
    LOZO_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = LOZO_MUL(y[i], a.decay);
  }
  if (MOMENTUM) {
    unpack(m, Eight<float>{{momentum[0], momentum[1]}});
    LOZO_UNROLL
    for (int i = 0; i < 8; ++i) m[i] = LOZO_MUL(m[i], a.beta);
  }
  LOZO_UNROLL
  for (int d = 0; d < DRAWS; ++d) {
    float z[8];
    dense_eight<SIGNS, kPieces<T> == 1>(z, a.noise[d], a.keys, quad, quad + (uint32_t)second / 4, high);
    LOZO_UNROLL
    for (int i = 0; i < 8; ++i) {
      y[i] = LOZO_ADD(y[i], LOZO_MUL(z[i], a.scales[d]));
      if (MOMENTUM) m[i] = LOZO_ADD(m[i], LOZO_MUL(z[i], a.coefficients[d]));
    }
  }
  if (MOMENTUM) {
    Eight<float> out;
    pack(out, m);
    store_global((uint4 *)n, out.pieces[0]);
    if (both) store_global((uint4 *)(n + second), out.pieces[1]);
    LOZO_UNROLL
    for (int i = 0; i < 8; ++i) y[i] = LOZO_ADD(y[i], LOZO_MUL(m[i], a.alpha));
  }
  if constexpr (sizeof(T) == 2)
    if (stochastic) round_eight<T>(y, a.rounding, ((uint64_t)high << 32 | quad) << 2);
  pack(raw, y);
  LOZO_UNROLL
  for (int p = 0; p < kPieces<T>; ++p)
    if (p == 0 || both) store_global((uint4 *)(x + p * second), raw.pieces[p]);
}

template <class T, bool MOMENTUM, bool SIGNS, int DRAWS>
LOZO_DEVICE void update_dense_aligned(const Launch &launch) {
  constexpr int kRun = kPieceSize<T>;                         // adjacent elements of a thread
  constexpr int kStride = kDenseThreads * kRun * kPieces<T>;  // elements of a block at once
  const Tile tile = find_tile(launch);
  const DenseNumbers<DRAWS> a = dense_numbers<MOMENTUM, SIGNS, DRAWS>(launch, tile);
  const lozo_tensor &tensor = *tile.tensor;
  for (int row = 0; row < tile.rows; ++row) {
    T *x = (T *)tensor.x + weight_offset(tile) + row * tensor.row_stride;
    float *n = MOMENTUM ? (float *)tensor.n + contiguous_offset(tile, tensor.cols) + row * tensor.cols : nullptr;
    const uint64_t element = (uint64_t)(global_element(tile) + row * tensor.global_cols);
    // Stretches whose counters have the same high word, which saves work in the first rounds of Philox. There is nearly always one.
    for (int64_t begin = 0; begin < tile.cols;) {
      const uint32_t high = (uint32_t)((element + begin) >> 34);
      const int64_t until_carry = (int64_t)(((uint64_t)high + 1) << 34) - (int64_t)element;
      const int end = extent(until_carry, tile.cols);
      const uint32_t quad = (uint32_t)(element >> 2);
      for (int i = (int)begin + (int)threadIdx.x * kRun; i < end; i += kStride)
        update_eight<T, MOMENTUM, SIGNS, DRAWS>(x + i, MOMENTUM ? n + i : nullptr, quad + (uint32_t)i / 4, high, end - i,
                                                kDenseThreads * kRun, launch.call.rounding, a);
      begin = end;
    }
  }
}

// Any dtype, stride and width, one element after the other.
template <bool MOMENTUM, bool SIGNS>
LOZO_DEVICE void update_dense_any(const Launch &launch) {
  const Tile tile = find_tile(launch);
  const DenseNumbers<LOZO_MAX_DRAWS> a = dense_numbers<MOMENTUM, SIGNS, LOZO_MAX_DRAWS>(launch, tile);
  const lozo_tensor &tensor = *tile.tensor;
  const int dtype = (int)tensor.dtype;
  for (int64_t i = threadIdx.x; i < (int64_t)tile.rows * tile.cols; i += kDenseThreads) {
    const int row = (int)(i / tile.cols), col = (int)(i % tile.cols);
    const int64_t at = weight_offset(tile) + row * tensor.row_stride + col;
    const uint64_t element = (uint64_t)(global_element(tile) + row * tensor.global_cols + col);
    float *n = MOMENTUM ? (float *)tensor.n + contiguous_offset(tile, tensor.cols) + row * tensor.cols + col : nullptr;
    float y = load_element(tensor.x, at, dtype);
    if (a.decays) y = LOZO_MUL(y, a.decay);
    float m = MOMENTUM ? LOZO_MUL(load_global(n), a.beta) : 0.0f;
    for (int d = 0; d < (int)launch.call.num_draws; ++d) {
      constexpr int kShift = SIGNS ? 5 : 0;  // a word has one normal number, or 32 signs
      uint32_t c[4];
      noise_words(c, d ? a.noise[1] : a.noise[0], (uint32_t)(element >> (2 + kShift)), (uint32_t)(element >> (34 + kShift)));
      const uint32_t w = word_of(c, (int)(element >> kShift) & 3);
      const float z = SIGNS ? sign_of(w, (int)element & 31) : normal(w);
      y = LOZO_ADD(y, LOZO_MUL(z, d ? a.scales[1] : a.scales[0]));
      if (MOMENTUM) m = LOZO_ADD(m, LOZO_MUL(z, d ? a.coefficients[1] : a.coefficients[0]));
    }
    if (MOMENTUM) {
      store_global(n, m);
      y = LOZO_ADD(y, LOZO_MUL(m, a.alpha));
    }
    if (launch.call.rounding) y = round_element(y, a.rounding, element, dtype);
    store_element(tensor.x, at, dtype, y);
  }
}

}  // namespace lozo

#endif
