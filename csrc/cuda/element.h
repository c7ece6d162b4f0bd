// Weights in memory and as fp32: 128 bits at a time, or one element of any dtype.
#ifndef LOZO_CUDA_ELEMENT_H
#define LOZO_CUDA_ELEMENT_H

#include "device.h"
#include "lozo/abi.h"

namespace lozo {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Eight elements of a row as they lie in memory, in pieces of 128 bits: one of a half-precision type, two of fp32.
template <class T>
constexpr int kPieces = (int)sizeof(T) / 2;
template <class T>
constexpr int kPieceSize = 16 / (int)sizeof(T);

template <class T>
struct Eight {
  uint4 pieces[kPieces<T>];
};

LOZO_DEVICE void unpack(float (&y)[8], const Eight<float> &x) {
  LOZO_UNROLL
  for (int i = 0; i < 2; ++i) {
    y[4 * i] = float_from_bits(x.pieces[i].x), y[4 * i + 1] = float_from_bits(x.pieces[i].y);
    y[4 * i + 2] = float_from_bits(x.pieces[i].z), y[4 * i + 3] = float_from_bits(x.pieces[i].w);
  }
}

LOZO_DEVICE float low_half(bf16, uint32_t w) { return float_from_bits(w << 16); }
LOZO_DEVICE float high_half(bf16, uint32_t w) { return float_from_bits(w & 0xffff0000u); }
LOZO_DEVICE float low_half(f16, uint32_t w) { return f16_to_float((uint16_t)w); }
LOZO_DEVICE float high_half(f16, uint32_t w) { return f16_to_float((uint16_t)(w >> 16)); }

template <class T>
LOZO_DEVICE void unpack(float (&y)[8], const Eight<T> &x) {
  const uint32_t w[4] = {x.pieces[0].x, x.pieces[0].y, x.pieces[0].z, x.pieces[0].w};
  LOZO_UNROLL
  for (int i = 0; i < 4; ++i) y[2 * i] = low_half(T(), w[i]), y[2 * i + 1] = high_half(T(), w[i]);
}

LOZO_DEVICE uint32_t pack(bf16, float low, float high) { return pack_bf16(low, high); }
LOZO_DEVICE uint32_t pack(f16, float low, float high) { return pack_f16(low, high); }

LOZO_DEVICE void pack(Eight<float> &x, const float (&y)[8]) {
  LOZO_UNROLL
  for (int i = 0; i < 2; ++i)
    x.pieces[i] = make_uint4(bits_from_float(y[4 * i]), bits_from_float(y[4 * i + 1]), bits_from_float(y[4 * i + 2]),
                             bits_from_float(y[4 * i + 3]));
}

template <class T>
LOZO_DEVICE void pack(Eight<T> &x, const float (&y)[8]) {
  x.pieces[0] = make_uint4(pack(T(), y[0], y[1]), pack(T(), y[2], y[3]), pack(T(), y[4], y[5]), pack(T(), y[6], y[7]));
}

// The element at ``index`` of an array of any lozo_dtype.
LOZO_DEVICE float load_element(int64_t x, int64_t index, int dtype) {
  if (dtype == LOZO_FLOAT32) return load_global((const float *)x + index);
  const uint32_t bits = load_global((const uint16_t *)x + index);
  return dtype == LOZO_BFLOAT16 ? low_half(bf16(), bits) : low_half(f16(), bits);
}

LOZO_DEVICE void store_element(int64_t x, int64_t index, int dtype, float y) {
  if (dtype == LOZO_FLOAT32) {
    store_global((float *)x + index, y);
  } else {
    store_global((uint16_t *)x + index, (uint16_t)(dtype == LOZO_BFLOAT16 ? pack_bf16(y, 0.0f) : pack_f16(y, 0.0f)));
  }
}

}  // namespace lozo

#endif
