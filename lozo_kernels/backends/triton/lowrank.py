"""X <- decay * X + sum over draws of scale * U V^T, and LOZO-M's update, one tile of a matrix per program.

U is regenerated per tile; the product runs on tensor cores. Factors are multiples of 2^-8 below 4.9, so fp16 holds them and the
fp32 sums are exact in any order (DESIGN: docs/noise.md).
"""

import triton
import triton.language as tl

from .noise import STREAM_U, draw_words, factor, rounding_any, rounding_rows, rounding_words, seed_words
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .weights import as_fp32, store_stochastic, store_weights


@triton.jit
def round_and_store(
    pointer, y, mask, header, element, tensor_id, k0, k1,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, EMULATE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Writes a (ROWS, COLS) block; ``element`` (ROWS, 1) is the flat index of the block's first column in every row."""
    if STOCHASTIC and pointer.dtype.element_ty != tl.float32:
        index, c3 = rounding_words(header)
        if ALIGNED:
            counter = (element >> 3) + tl.arange(0, COLS // 8)[None, :]
            bits = rounding_rows(counter, index, tensor_id, c3, k0, k1, ROWS, COLS)
        else:
            bits = rounding_any(element + tl.arange(0, COLS)[None, :], index, tensor_id, c3, k0, k1)
        store_stochastic(pointer, y, bits, mask)
    else:
        store_weights(pointer, y, mask, EMULATE)


@triton.jit
def draw_factor(
    header, tensor_id, first, k0, k1, DRAW: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """U of one draw for the rows of a tile, (ROWS, PADDED) fp16, exact."""
    direction, c3 = draw_words(header, DRAW, STREAM_U)
    return factor(first, tensor_id, direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A).to(tl.float16)


@triton.jit
def split_rows(n):
    """fp32 rows as high + low / 2^11 times a power of two per row: 22 bits in two fp16, whatever the magnitude."""
    largest = tl.max(tl.abs(n), 1)
    exponent = (largest.to(tl.uint32, bitcast=True) >> 23).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 20), 240)
    up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)  # the largest becomes 2^14 to 2^15
    down = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    scaled = n * up[:, None]
    high = scaled.to(tl.float16)
    low = ((scaled - high.to(tl.float32)) * 2048.0).to(tl.float16)
    return high, low, down


@triton.jit
def momentum_columns(n_row, row_mask, RANK: tl.constexpr):
    """The columns of N for the rows of a tile, one tensor each, in registers for the whole tile."""
    columns = (tl.load(n_row, mask=row_mask, other=0.0),)
    for k in tl.static_range(1, RANK):
        columns = columns + (tl.load(n_row + k, mask=row_mask, other=0.0),)  # noqa: RUF005
    return columns


@triton.jit
def momentum_block(columns, v_matrix, cols, col_mask, width, RANK: tl.constexpr):
    """N V^T of a block with k ascending, each a rounded multiply and a rounded add; (rows, cols) fp32."""
    v = tl.load(v_matrix + cols, mask=col_mask, other=0.0).to(tl.float32)
    acc = columns[0][:, None] * v[None, :]
    for k in tl.static_range(1, RANK):
        v = tl.load(v_matrix + k * width + cols, mask=col_mask, other=0.0).to(tl.float32)
        acc = acc + columns[k][:, None] * v[None, :]
    return acc


@triton.jit
def update_tile(
    WEIGHT: tl.constexpr, tile, tensors, t, matrix, row0, block0, header, scales, decay, alpha, count,
    RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """One tile of ROWS by BLOCKS * COLS, for weights of one dtype. EXACT momentum products go up to rank 8."""
    x, batch_stride, row_stride = weights_at(tensors, t)
    v, n = factors_at(tensors, t)
    height, width = extent_at(tensors, t)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    x = x.to(tl.pointer_type(WEIGHT))
    height32 = height.to(tl.int32)
    width32 = width.to(tl.int32)
    if ALIGNED:
        x = tl.multiple_of(x, 16)
        v = tl.multiple_of(v, 16)
        batch_stride = tl.multiple_of(batch_stride, 8)
        row_stride = tl.multiple_of(row_stride, 8)
        width = tl.multiple_of(width, 8)
        width32 = tl.multiple_of(width32, 8)
    rows = row0 + tl.arange(0, ROWS)
    row_mask = rows < height32
    x_rows = x + matrix.to(tl.int64) * batch_stride + rows.to(tl.int64)[:, None] * row_stride
    col0 = block0 * (BLOCKS * COLS)
    end = tl.minimum(width32, col0 + BLOCKS * COLS)
    if AHEAD:  # on the way while U is made; then always one block before the one that is worked on
        cols = col0 + tl.arange(0, COLS)
        ahead = tl.load(x_rows + cols[None, :], mask=row_mask[:, None] & (cols < end)[None, :])
    global_row = row_offset + matrix.to(tl.int64) * height + row0
    first = global_row.to(tl.uint32)
    u0 = draw_factor(header, tensor_id, first, k0, k1, 0, ROWS, RANK, PADDED, DP4A)
    scale0 = tl.load(scales + t)
    if DRAWS == 2:
        u1 = draw_factor(header, tensor_id, first, k0, k1, 1, ROWS, RANK, PADDED, DP4A)
        scale1 = tl.load(scales + count + t)
    if DECAY:
        factor_of_x = tl.load(decay + t)
    ks = tl.arange(0, PADDED)
    if MOMENTUM:
        rate = tl.load(alpha + t)
        n_row = n + (matrix.to(tl.int64) * height + rows) * RANK
        if RANK > 8:
            n_block = tl.load(n_row[:, None] + ks[None, :], mask=row_mask[:, None] & (ks[None, :] < RANK), other=0.0)
            high, low, unit = split_rows(n_block)
        else:
            columns = momentum_columns(n_row, row_mask, RANK)
    v_matrix = v + matrix.to(tl.int64) * RANK * width
    if ALIGNED:
        v_matrix = tl.multiple_of(v_matrix, 16)
    v_rows = v_matrix + ks.to(tl.int64)[:, None] * width
    flat = (global_row + tl.arange(0, ROWS).to(tl.int64)[:, None]) * global_cols + col_offset
    for block in range(0, (end - col0 + COLS - 1) // COLS):
        start = col0 + block * COLS
        cols = start + tl.arange(0, COLS)
        col_mask = cols < width32
        mask = row_mask[:, None] & col_mask[None, :]
        pointer = x_rows + cols[None, :]
        if AHEAD:
            y = as_fp32(ahead, EMULATE)
            ahead = tl.load(pointer + COLS, mask=row_mask[:, None] & (cols + COLS < end)[None, :])
        else:
            y = as_fp32(tl.load(pointer, mask=mask), EMULATE)
        if RANK < PADDED:
            v_block = tl.load(v_rows + cols[None, :], mask=(ks[:, None] < RANK) & col_mask[None, :], other=0.0)
        else:
            v_block = tl.load(v_rows + cols[None, :], mask=col_mask[None, :], other=0.0)
        if DECAY:
            y = y * factor_of_x
        y = y + tl.dot(u0, v_block) * scale0
        if DRAWS == 2:
            y = y + tl.dot(u1, v_block) * scale1
        if MOMENTUM:
            if RANK > 8:
                product = tl.dot(high, v_block) + tl.dot(low, v_block) * 0.00048828125
                product = product * unit[:, None]
            else:
                product = momentum_block(columns, v_matrix, cols, col_mask, width, RANK)
            y = y + product * rate
        round_and_store(pointer, y, mask, header, flat + start, tensor_id, k0, k1, STOCHASTIC, ALIGNED, EMULATE, ROWS, COLS)


@triton.jit(do_not_specialize=["count"])
def lowrank_update(
    tiles, tensors, header, scales, decay, alpha, count,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr,
    MOMENTUM: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    BLOCKS: tl.constexpr, AHEAD: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The op lowrank_update, and with MOMENTUM the weights' part of lowrank_momentum. WEIGHT None: any dtype, read per tensor."""
    t, matrix, row0, block0 = tile_at(tiles, tl.program_id(0))
    if WEIGHT is not None:
        update_tile(
            WEIGHT, tiles, tensors, t, matrix, row0, block0, header, scales, decay, alpha, count, RANK, PADDED, DRAWS, DECAY,
            MOMENTUM, STOCHASTIC, ALIGNED, ROWS, COLS, BLOCKS, AHEAD, DP4A,
            EMULATE,
        )  # fmt: skip
    else:
        code = dtype_at(tensors, t)
        if code == 0:
            update_tile(
                tl.float32, tiles, tensors, t, matrix, row0, block0, header, scales, decay, alpha, count, RANK, PADDED, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, ROWS, COLS, BLOCKS, AHEAD, DP4A,
            EMULATE,
            )  # fmt: skip
        elif code == 1:
            update_tile(
                tl.bfloat16, tiles, tensors, t, matrix, row0, block0, header, scales, decay, alpha, count, RANK, PADDED, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, ROWS, COLS, BLOCKS, AHEAD, DP4A,
            EMULATE,
            )  # fmt: skip
        else:
            update_tile(
                tl.float16, tiles, tensors, t, matrix, row0, block0, header, scales, decay, alpha, count, RANK, PADDED, DRAWS,
                DECAY, MOMENTUM, STOCHASTIC, ALIGNED, ROWS, COLS, BLOCKS, AHEAD, DP4A,
            EMULATE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def momentum_factor(
    tiles, tensors, header, coefficients, beta, count,
    RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, ROWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """N <- beta * N + sum of coefficient * U, ROWS rows per program, before lowrank_update reads N."""
    t, matrix, row0, _ = tile_at(tiles, tl.program_id(0))
    _, n = factors_at(tensors, t)
    height, _ = extent_at(tensors, t)
    tensor_id, row_offset, _, _ = place_at(tensors, t)
    k0, k1 = seed_words(header)
    matrix = matrix.to(tl.int64)
    first = (row_offset + matrix * height + row0).to(tl.uint32)
    rows = row0 + tl.arange(0, ROWS)
    ks = tl.arange(0, PADDED)
    mask = (rows < height)[:, None] & (ks < RANK)[None, :]
    pointer = n + (matrix * height + rows)[:, None] * RANK + ks[None, :]
    value = tl.load(pointer, mask=mask, other=0.0) * tl.load(beta + t)
    for d in tl.static_range(DRAWS):
        direction, c3 = draw_words(header, d, STREAM_U)
        u = factor(first, tensor_id, direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A)
        value = value + u * tl.load(coefficients + d * count + t)
    tl.store(pointer, value, mask=mask)
