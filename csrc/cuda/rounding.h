// Stochastic rounding into bf16 and fp16, as reference.round_stochastic does it.
#ifndef LOZO_CUDA_ROUNDING_H
#define LOZO_CUDA_ROUNDING_H

#include "element.h"
#include "tile.h"

namespace lozo {

LOZO_DEVICE bool is_finite(uint32_t u) { return (u & 0x7f800000u) != 0x7f800000u; }

// Everything except for the last conversion, which is exact, or overflows.
LOZO_DEVICE uint32_t add_random(bf16, uint32_t u, uint32_t bits) {
  const uint32_t quiet = (u & 0x7fffffffu) > 0x7f800000u ? u | 0x00400000u : u;
  return (is_finite(u) ? u + bits : quiet) & 0xffff0000u;
}

LOZO_DEVICE uint32_t add_random(f16, uint32_t u, uint32_t bits) {
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t normal = is_finite(u) ? (u + (bits >> 3)) & 0xffffe000u : u;
  // Below 2^-14 fp16 has a fixed grid of 2^-24: count its steps, with 16 more bits to round by.
  const float small = float_from_bits(magnitude < 0x38800000u ? magnitude : 0u);
  const int32_t steps = (int32_t)((uint32_t)(int32_t)LOZO_MUL(small, 0x1p40f) + bits) >> 16;
  const uint32_t subnormal = bits_from_float(LOZO_MUL((float)steps, 0x1p-24f)) | (u & 0x80000000u);
  return magnitude < 0x38800000u ? subnormal : normal;
}

template <class T>
LOZO_DEVICE float round_one(T, float y, uint32_t bits) {
  return float_from_bits(add_random(T(), bits_from_float(y), bits));
}

// Rounds eight values by the bits of one counter: those of the flat elements from ``element``, a multiple of eight, on.
template <class T>
LOZO_DEVICE void round_eight(float (&y)[8], const Noise &noise, uint64_t element) {
  uint32_t c[4];
  noise_words(c, noise, (uint32_t)(element >> 3), (uint32_t)(element >> 35));
  LOZO_UNROLL
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = round_one(T(), y[2 * i], c[i] & 0xffffu);
    y[2 * i + 1] = round_one(T(), y[2 * i + 1], c[i] >> 16);
  }
}
LOZO_DEVICE float round_element(float y, const Noise &noise, uint64_t element, int dtype) {
  if (dtype == LOZO_FLOAT32) return y;
  uint32_t c[4];
  noise_words(c, noise, (uint32_t)(element >> 3), (uint32_t)(element >> 35));
  const int word = (int)(element >> 1) & 3;
  const uint32_t pair = word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3];
  const uint32_t bits = element & 1 ? pair >> 16 : pair & 0xffffu;
  return dtype == LOZO_BFLOAT16 ? round_one(bf16(), y, bits) : round_one(f16(), y, bits);
}

}  // namespace lozo

#endif
