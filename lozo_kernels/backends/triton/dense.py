"""X <- decay * X + sum over draws of scale * Z, and MeZO-M's update, a stretch of one row per program."""

import triton
import triton.language as tl

from .noise import (
    STREAM_Z,
    dense_any,
    dense_block,
    draw_words,
    rounding_any,
    rounding_rows,
    rounding_words,
    seed_words,
)
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .weights import as_fp32, store_stochastic, store_weights


@triton.jit
def dense_noise(
    header, first, tensor_id, k0, k1, DRAW: tl.constexpr, ALIGNED: tl.constexpr, COUNT: tl.constexpr, DP4A: tl.constexpr
):
    """(COUNT,) fp32 of Z of one draw from flat element ``first``."""
    direction, c3 = draw_words(header, DRAW, STREAM_Z)
    if ALIGNED:
        return dense_block(first, direction, tensor_id, c3, k0, k1, COUNT, DP4A)
    else:
        return dense_any(first + tl.arange(0, COUNT), direction, tensor_id, c3, k0, k1, DP4A)


@triton.jit
def update_stretch(
    WEIGHT: tl.constexpr, tensors, t, matrix, row, block0, header, scales, decay, coefficients, alpha, beta, count,
    DRAWS: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
    COUNT: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """BLOCKS * COUNT elements of one row, for weights of one dtype."""
    x, batch_stride, row_stride = weights_at(tensors, t)
    _, n = factors_at(tensors, t)
    height, width = extent_at(tensors, t)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    local_row = matrix.to(tl.int64) * height + row
    x = x.to(tl.pointer_type(WEIGHT)) + matrix.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride
    n = n + local_row * width
    flat = (row_offset + local_row) * global_cols + col_offset
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        n = tl.multiple_of(n, 16)
        width = tl.multiple_of(width, 8)
    scale0 = tl.load(scales + t)
    if DRAWS == 2:
        scale1 = tl.load(scales + count + t)
    if DECAY:
        factor_of_x = tl.load(decay + t)
    if MOMENTUM:
        rate = tl.load(alpha + t)
        keep = tl.load(beta + t)
        coefficient0 = tl.load(coefficients + t)
        if DRAWS == 2:
            coefficient1 = tl.load(coefficients + count + t)
    col0 = block0.to(tl.int64) * (BLOCKS * COUNT)
    blocks = ((tl.minimum(width - col0, BLOCKS * COUNT) + COUNT - 1) // COUNT).to(tl.int32)
    for block in range(0, blocks):
        start = col0 + block * COUNT
        cols = start + tl.arange(0, COUNT)
        mask = cols < width
        y = as_fp32(tl.load(x + cols, mask=mask), EMULATE)
        z0 = dense_noise(header, flat + start, tensor_id, k0, k1, 0, ALIGNED, COUNT, DP4A)
        if DRAWS == 2:
            z1 = dense_noise(header, flat + start, tensor_id, k0, k1, 1, ALIGNED, COUNT, DP4A)
        if DECAY:
            y = y * factor_of_x
        y = y + z0 * scale0
        if DRAWS == 2:
            y = y + z1 * scale1
        if MOMENTUM:
            m = tl.load(n + cols, mask=mask, other=0.0) * keep
            m = m + z0 * coefficient0
            if DRAWS == 2:
                m = m + z1 * coefficient1
            tl.store(n + cols, m, mask=mask)
            y = y + m * rate
        if STOCHASTIC and tl.float32 != WEIGHT:
            index, c3 = rounding_words(header)
            if ALIGNED:
                counter = ((flat + start) >> 3) + tl.arange(0, COUNT // 8)[None, :]
                bits = rounding_rows(counter, index, tensor_id, c3, k0, k1, 1, COUNT).reshape(COUNT)
            else:
                bits = rounding_any(flat + cols, index, tensor_id, c3, k0, k1)
            store_stochastic(x + cols, y, bits, mask)
        else:
            store_weights(x + cols, y, mask, EMULATE)


@triton.jit(do_not_specialize=["count"])
def dense_update(
    tiles, tensors, header, scales, decay, coefficients, alpha, beta, count,
    WEIGHT: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The op dense_update, and with MOMENTUM dense_momentum. WEIGHT None: any dtype, read per tensor."""
    t, matrix, row, block0 = tile_at(tiles, tl.program_id(0))
    if WEIGHT is not None:
        update_stretch(
            WEIGHT, tensors, t, matrix, row, block0, header, scales, decay, coefficients, alpha, beta, count, DRAWS, DECAY,
            MOMENTUM, STOCHASTIC, ALIGNED, COUNT, BLOCKS, DP4A, EMULATE,
        )  # fmt: skip
    else:
        code = dtype_at(tensors, t)
        if code == 0:
            update_stretch(
                tl.float32, tensors, t, matrix, row, block0, header, scales, decay, coefficients, alpha, beta, count, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, COUNT, BLOCKS, DP4A, EMULATE,
            )  # fmt: skip
        elif code == 1:
            update_stretch(
                tl.bfloat16, tensors, t, matrix, row, block0, header, scales, decay, coefficients, alpha, beta, count, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, COUNT, BLOCKS, DP4A, EMULATE,
            )  # fmt: skip
        else:
            update_stretch(
                tl.float16, tensors, t, matrix, row, block0, header, scales, decay, coefficients, alpha, beta, count, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, COUNT, BLOCKS, DP4A, EMULATE,
            )  # fmt: skip
