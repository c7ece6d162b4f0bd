// A block's part of the work, and the noise coordinates that all elements of a tensor share.
#ifndef LOZO_CUDA_TILE_H
#define LOZO_CUDA_TILE_H

#include "device.h"
#include "lozo/abi_cuda.h"

namespace lozo {

// The arguments of every kernel.
struct Launch {
  lozo_gpu_tiles tiles;
  lozo_gpu_call call;
};

// A rectangle of one matrix, in local rows and columns.
struct Tile {
  const lozo_tensor *tensor;
  int64_t index;  // index of the tensor in the table
  int64_t matrix;
  int64_t row, col;
  int rows, cols;
  int64_t last;  // the last number of the entry: a column or, if tiles are of rows alone, the index of the matrix among all
};

LOZO_DEVICE int extent(int64_t tile, int64_t left) { return (int)(tile && tile < left ? tile : left); }

LOZO_DEVICE Tile find_tile(const Launch &launch) {
  const int32_t *entry = launch.tiles.tiles + 4 * (int64_t)blockIdx.x;
  Tile t;
  t.index = entry[0], t.matrix = entry[1], t.row = entry[2], t.last = entry[3];
  t.col = t.last * launch.tiles.cols;
  t.tensor = launch.call.tensors + t.index;
  t.rows = extent(launch.tiles.rows, t.tensor->rows - t.row);
  t.cols = extent(launch.tiles.cols, t.tensor->cols - t.col);
  return t;
}

// The global row of a tile's first row, and the flat index of its first element.
LOZO_DEVICE int64_t global_row(const Tile &t) { return t.tensor->row_offset + t.matrix * t.tensor->rows + t.row; }
LOZO_DEVICE int64_t global_element(const Tile &t) { return global_row(t) * t.tensor->global_cols + t.tensor->col_offset + t.col; }
// The position of the tile's first element in x, and in a contiguous tensor of ``width`` columns.
LOZO_DEVICE int64_t weight_offset(const Tile &t) {
  return t.matrix * t.tensor->batch_stride + t.row * t.tensor->row_stride + t.col;
}
LOZO_DEVICE int64_t contiguous_offset(const Tile &t, int64_t width) { return (t.matrix * t.tensor->rows + t.row) * width + t.col; }

// Reads a scalar that each tensor has one of, or one for each draw.
LOZO_DEVICE float of_tensor(const float *values, const Launch &launch, const Tile &t, int draw = 0) {
  return values[draw * launch.call.count + t.index];
}
// Without decay the factor is 1, which changes nothing.
LOZO_DEVICE float decay_of(const Launch &launch, const Tile &t) { return launch.call.decay ? launch.call.decay[t.index] : 1.0f; }

// The key, and the part of a Philox counter that is the same for all values of a draw.
struct Noise {
  uint64_t seed;
  uint32_t direction;  // shifted by 8 bits
  uint32_t tensor_id;
  uint32_t draw;  // draw_word
};

LOZO_DEVICE Noise make_noise(const Launch &launch, const Tile &t, Stream stream, int direction, int step) {
  const uint32_t *header = launch.call.header;
  return {header[LOZO_SEED_LOW] | (uint64_t)header[LOZO_SEED_HIGH] << 32, header[direction] << 8, (uint32_t)t.tensor->tensor_id,
          draw_word(stream, header[step])};
}
LOZO_DEVICE Noise draw_noise(const Launch &launch, const Tile &t, Stream stream, int draw) {
  return make_noise(launch, t, stream, LOZO_DIRECTION_0 + draw, LOZO_STEP_0 + draw);
}
LOZO_DEVICE Noise rounding_noise(const Launch &launch, const Tile &t) {
  return make_noise(launch, t, kStreamRounding, LOZO_ROUNDING_INDEX, LOZO_ROUNDING_STEP);
}

// The words of a counter: of a flat stream its low 32 bits and those above, of a factor its row and the group of four ranks. It
// makes the twenty round keys when they are needed, which leaves registers to kernels that need many.
LOZO_DEVICE void noise_words(uint32_t (&c)[4], const Noise &noise, uint32_t low, uint32_t high) {
  c[0] = low, c[1] = high | noise.direction, c[2] = noise.tensor_id, c[3] = noise.draw;
  philox(c, (uint64_t)made_here((uint32_t)(noise.seed >> 32)) << 32 | made_here((uint32_t)noise.seed));
}

// For many counters one after the other: the round keys are made once and kept.
struct RoundKeys {
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

LOZO_DEVICE RoundKeys make_keys(uint64_t seed) {
  RoundKeys keys;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  LOZO_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round, k0 += kPhiloxW0, k1 += kPhiloxW1)
    keys.k0[round] = made_here(k0), keys.k1[round] = made_here(k1);
  return keys;
}

LOZO_DEVICE void noise_words(uint32_t (&c)[4], const Noise &noise, const RoundKeys &keys, uint32_t low, uint32_t high) {
  c[0] = low, c[1] = high | noise.direction, c[2] = noise.tensor_id, c[3] = noise.draw;
  LOZO_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) philox_round(c, keys.k0[round], keys.k1[round]);
}

// Columns 4 group .. 4 group + 3 of a factor's row.
LOZO_DEVICE void factor_values(float (&z)[4], const Noise &noise, uint32_t row, int group) {
  uint32_t c[4];
  noise_words(c, noise, row, (uint32_t)group);
  const float grid = float_from_bits(kGridBits);
  LOZO_UNROLL
  for (int i = 0; i < 4; ++i) z[i] = LOZO_ADD(LOZO_ADD(normal(c[i]), grid), -grid);
}

}  // namespace lozo

#endif
