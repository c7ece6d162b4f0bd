"""The kernels of lowrank_merge (one tile of a matrix per program) and dense_merge (a stretch of one row per program).

N holds any fp32 number, so the product is a rounded multiply and a rounded add for each k, ascending, without tensor cores.
"""

import triton
import triton.language as tl

from .lowrank import momentum_block, momentum_columns, random_bits
from .noise import (
    STREAM_U,
    STREAM_Z,
    dense_any,
    dense_block,
    draw_words,
    factor,
    factor_quad,
    rounding_any,
    rounding_block,
    rounding_words,
    seed_words,
)
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .weights import as_fp32, read_any, read_bf16_pairs, read_weights, store_any, store_stochastic, store_weights

REGISTER_RANK = tl.constexpr(16)  # up to this rank the columns of N + scale * U stay in registers for a whole tile


@triton.jit
def merged_quad(
    n_row, row_mask, global_rows, quad, direction, tensor_id, c3, k0, k1, scale,
    COUNT: tl.constexpr, DRAWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Returns COUNT columns of N + scale * U, or without draws of N, from column 4 * quad on, for the rows of a tile."""
    columns = momentum_columns(n_row + quad * 4, row_mask, COUNT)
    if DRAWS == 1:
        us = factor_quad(global_rows, global_rows * 0 + (direction + quad), tensor_id, c3, k0, k1, DP4A)
        probed = (columns[0] + us[0] * scale,)
        for k in tl.static_range(1, COUNT):
            probed = probed + (columns[k] + us[k] * scale,)  # type: ignore[assignment]  # noqa: RUF005
        columns = probed
    return columns


@triton.jit
def add_columns(product, columns, pointer, col_mask, width, COUNT: tl.constexpr):
    """Adds the next COUNT terms to a sum like that of :func:`momentum_block`; ``pointer`` is in their first row of V."""
    for k in tl.static_range(COUNT):
        v = tl.load(pointer + k * width, mask=col_mask).to(tl.float32)
        product = product + columns[k][:, None] * v[None, :]
    return product


@triton.jit
def wide_product(
    x, factor_row, row_mask, v_matrix, cols, col_mask, width, quads, RANK: tl.constexpr
):  # fmt: skip
    """Returns F V^T of a block, with four columns of F in registers at a time.

    ``quads`` is RANK // 4, but no constant: the compiler would unroll the loop and want registers for all columns at once.
    """
    # -0 added to a number is that number. The condition never holds; it makes Triton lay the sum out over the threads as x is.
    product = tl.where(quads < 0, x, -0.0)
    for quad in range(0, quads):
        columns = momentum_columns(factor_row + quad * 4, row_mask, 4)
        product = add_columns(product, columns, v_matrix + quad * 4 * width + cols, col_mask, width, 4)
    REST: tl.constexpr = RANK % 4
    if REST > 0:
        columns = momentum_columns(factor_row + quads * 4, row_mask, REST)
        product = add_columns(product, columns, v_matrix + quads * 4 * width + cols, col_mask, width, REST)
    return product


@triton.jit
def probed_factor(
    tiles, tensors, header, scales, factors, starts,
    RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """factors <- N + scale * U, where tensor t has the rows from starts[t] on; ROWS rows per program."""
    t, matrix, row0, _ = tile_at(tiles, tl.program_id(0))
    _, n = factors_at(tensors, t, False)
    height, _ = extent_at(tensors, t, False)
    tensor_id, row_offset, _, _ = place_at(tensors, t)
    k0, k1 = seed_words(header)
    direction, c3 = draw_words(header, 0, STREAM_U)
    first = matrix.to(tl.int64) * height + row0
    u = factor((row_offset + first).to(tl.uint32), tensor_id, direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A)
    rows = tl.arange(0, ROWS)
    ks = tl.arange(0, PADDED)
    mask = (row0 + rows < height)[:, None] & (ks < RANK)[None, :]
    at = (first + rows)[:, None] * RANK + ks[None, :]
    value = tl.load(n + at, mask=mask, other=0.0) + u * tl.load(scales + t)
    tl.store(factors + tl.load(starts + t) * RANK + at, value, mask=mask)


@triton.jit
def merge_block(
    x, out, start, row_mask, end, v_matrix, width, factor_row, columns, quads, factor_of_x,
    flat, header, tensor_id, k0, k1, address, out_address, code,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Merges a block of ROWS by COLS; ``x`` and ``out`` are pointers to its rows, or offsets where WEIGHT is None.

    MASKED: some of its rows or columns do not exist.
    """
    cols = start + tl.arange(0, COLS)
    mask = None
    col_mask = None
    if MASKED:
        col_mask = cols < end
        mask = row_mask[:, None] & col_mask[None, :]
    if WEIGHT is None:
        y = read_any(address, x + cols[None, :], mask, code, EMULATE)
    else:
        y = as_fp32(read_weights(x + cols[None, :], mask), EMULATE)
    if DECAY:
        y = y * factor_of_x
    if RANK <= REGISTER_RANK:
        product = momentum_block(columns, v_matrix, cols, col_mask, width, RANK)
    else:
        product = wide_product(y, factor_row, row_mask, v_matrix, cols, col_mask, width, quads, RANK)
    y = y + product
    bits = 0
    if STOCHASTIC and tl.float32 != WEIGHT:
        bits = random_bits(header, flat + start, tensor_id, k0, k1, WEIGHT is not None, ROWS, COLS)
    if WEIGHT is None:
        store_any(out_address, out + cols[None, :], y, bits, mask, code, STOCHASTIC, EMULATE)
    elif STOCHASTIC and tl.float32 != WEIGHT:
        store_stochastic(out + cols[None, :], y, bits, mask)
    else:
        store_weights(out + cols[None, :], y, mask, EMULATE)


@triton.jit(do_not_specialize=["quads"])
def lowrank_merge(
    tiles, tensors, outputs, header, scales, decay, factors, starts, quads,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The kernel of lowrank_merge, with no draw or one. Of the table ``outputs``, only addresses and strides are read.

    Above REGISTER_RANK, N + scale * U is read from ``factors``, where :func:`probed_factor` wrote it, and ``quads`` is RANK // 4.
    A program merges one tile of ROWS by BLOCKS * COLS. WEIGHT None: any dtype, read per tensor, and any alignment.
    """
    ALIGNED: tl.constexpr = WEIGHT is not None
    t, matrix, row0, block0 = tile_at(tiles, tl.program_id(0))
    address, batch_stride, row_stride = weights_at(tensors, t, ALIGNED)
    out_address, out_batch_stride, out_row_stride = weights_at(outputs, t, ALIGNED)
    v, n = factors_at(tensors, t, ALIGNED)
    height, width = extent_at(tensors, t, ALIGNED)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    direction, c3 = draw_words(header, 0, STREAM_U)
    matrix = matrix.to(tl.int64)
    height32 = height.to(tl.int32)
    width32 = width.to(tl.int32)
    if ALIGNED:
        v = tl.multiple_of(v, 16)
        batch_stride = tl.multiple_of(batch_stride, 8)
        row_stride = tl.multiple_of(row_stride, 8)
        out_batch_stride = tl.multiple_of(out_batch_stride, 8)
        out_row_stride = tl.multiple_of(out_row_stride, 8)
        width = tl.multiple_of(width, 8)
        width32 = tl.multiple_of(width32, 8)
    rows = row0 + tl.arange(0, ROWS)
    row_mask = rows < height32
    x = matrix * batch_stride + rows.to(tl.int64)[:, None] * row_stride
    out = matrix * out_batch_stride + rows.to(tl.int64)[:, None] * out_row_stride
    code = 0
    if ALIGNED:
        x = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)), 16) + x
        out = tl.multiple_of(out_address.to(tl.pointer_type(WEIGHT)), 16) + out
    else:
        code = dtype_at(tensors, t)
    scale = 0.0
    if DRAWS == 1:
        scale = tl.load(scales + t)
    factor_of_x = 1.0
    if DECAY:
        factor_of_x = tl.load(decay + t)
    global_row = row_offset + matrix * height + row0
    global_rows = (global_row + tl.arange(0, ROWS).to(tl.int64)).to(tl.uint32)
    WIDE: tl.constexpr = RANK > REGISTER_RANK
    if WIDE and DRAWS == 1:
        n = factors + tl.load(starts + t) * RANK
    factor_row = n + (matrix * height + rows) * RANK
    columns = (scale,)
    if not WIDE:
        columns = merged_quad(
            factor_row, row_mask, global_rows, 0, direction, tensor_id, c3, k0, k1, scale, RANK if RANK < 4 else 4, DRAWS, DP4A
        )
        for quad in tl.static_range(1, (RANK + 3) // 4):
            columns = columns + merged_quad(
                factor_row, row_mask, global_rows, quad, direction, tensor_id, c3, k0, k1, scale,
                RANK - quad * 4 if RANK - quad * 4 < 4 else 4, DRAWS, DP4A,
            )  # fmt: skip
    v_matrix = v + matrix * RANK * width
    if ALIGNED:
        v_matrix = tl.multiple_of(v_matrix, 16)
    flat = (global_row + tl.arange(0, ROWS).to(tl.int64)[:, None]) * global_cols + col_offset
    col0 = block0 * (BLOCKS * COLS)
    end = tl.minimum(width32, col0 + BLOCKS * COLS)
    full = 0
    if ALIGNED:
        full = tl.where(row0 + ROWS <= height32, (end - col0) // COLS, 0)
        for block in range(0, full):
            merge_block(
                x, out, col0 + block * COLS, row_mask, end, v_matrix, width, factor_row, columns, quads, factor_of_x,
                flat, header, tensor_id, k0, k1, address, out_address, code,
                WEIGHT, RANK, DECAY, STOCHASTIC, ROWS, COLS, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (end - col0 + COLS - 1) // COLS):
        merge_block(
            x, out, col0 + block * COLS, row_mask, end, v_matrix, width, factor_row, columns, quads, factor_of_x,
            flat, header, tensor_id, k0, k1, address, out_address, code,
            WEIGHT, RANK, DECAY, STOCHASTIC, ROWS, COLS, EMULATE, True,
        )  # fmt: skip


@triton.jit
def dense_merge_block(
    address, x, out_address, out, n, first, block, left, code, tensor_id, k0, k1, direction, c3_z, index, c3, scale, factor_of_x,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Merges COUNT elements; with MASKED, those below ``left`` in the stretch. ``x`` and ``out`` are as in :func:`merge_block`."""
    ALIGNED: tl.constexpr = WEIGHT is not None
    cols = block * COUNT + tl.arange(0, COUNT)
    mask = None
    half_mask = None
    if MASKED:
        mask = cols < left
        half_mask = block * (COUNT // 2) + tl.arange(0, COUNT // 2) < left // 2
    if not ALIGNED:
        y = read_any(address, x + cols, mask, code, EMULATE)
    elif tl.bfloat16 == WEIGHT:
        y = read_bf16_pairs(x, block * COUNT, half_mask, COUNT)
    else:
        y = as_fp32(read_weights(x + cols, mask), EMULATE)
    if DECAY:
        y = y * factor_of_x
    if DRAWS == 1:
        if ALIGNED:
            term = dense_block(first, block * COUNT, direction, tensor_id, c3_z, k0, k1, COUNT, DP4A) * scale
        else:
            term = dense_any(first + cols, direction, tensor_id, c3_z, k0, k1, DP4A) * scale
        if FACTOR:
            term = tl.load(n + cols, mask=mask) + term
        y = y + term
    elif FACTOR:
        y = y + tl.load(n + cols, mask=mask)
    bits = 0
    if STOCHASTIC:
        if ALIGNED:
            bits = rounding_block(first, block * COUNT, index, tensor_id, c3, k0, k1, COUNT)
        else:
            bits = rounding_any(first + cols, index, tensor_id, c3, k0, k1)
    if not ALIGNED:
        store_any(out_address, out + cols, y, bits, mask, code, STOCHASTIC, EMULATE)
    elif STOCHASTIC and tl.float32 != WEIGHT:
        store_stochastic(out + cols, y, bits, mask)
    else:
        store_weights(out + cols, y, mask, EMULATE)


@triton.jit
def dense_merge(
    tiles, tensors, outputs, header, scales, decay,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    COUNT: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The kernel of dense_merge, with no draw or one, and with N if FACTOR. Its tiles are those of dense_update."""
    ALIGNED: tl.constexpr = WEIGHT is not None
    t, matrix, row, block0 = tile_at(tiles, tl.program_id(0))
    address, batch_stride, row_stride = weights_at(tensors, t, ALIGNED)
    out_address, out_batch_stride, out_row_stride = weights_at(outputs, t, ALIGNED)
    _, n = factors_at(tensors, t, ALIGNED)
    height, width = extent_at(tensors, t, ALIGNED)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    direction, c3_z = draw_words(header, 0, STREAM_Z)
    index, c3 = rounding_words(header)
    matrix = matrix.to(tl.int64)
    row = row.to(tl.int64)
    local_row = matrix * height + row
    col0 = block0.to(tl.int64) * (BLOCKS * COUNT)
    x = matrix * batch_stride + row * row_stride + col0
    out = matrix * out_batch_stride + row * out_row_stride + col0
    n = n + local_row * width + col0
    first = (row_offset + local_row) * global_cols + col_offset + col0
    left = tl.minimum(width - col0, BLOCKS * COUNT).to(tl.int32)
    code = 0
    if ALIGNED:
        x = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)) + x, 16)
        out = tl.multiple_of(out_address.to(tl.pointer_type(WEIGHT)) + out, 16)
        n = tl.multiple_of(n, 16)
        left = tl.multiple_of(left, 8)
    else:
        code = dtype_at(tensors, t)
    scale = 0.0
    if DRAWS == 1:
        scale = tl.load(scales + t)
    factor_of_x = 1.0
    if DECAY:
        factor_of_x = tl.load(decay + t)
    full = 0
    if ALIGNED:
        full = left // COUNT
        for block in range(0, full):  # without masks, which cost an instruction for every other element
            dense_merge_block(
                address, x, out_address, out, n, first, block, left, code, tensor_id, k0, k1, direction, c3_z, index, c3, scale,
                factor_of_x, WEIGHT, FACTOR, DRAWS, DECAY, STOCHASTIC, COUNT, DP4A, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (left + COUNT - 1) // COUNT):
        dense_merge_block(
            address, x, out_address, out, n, first, block, left, code, tensor_id, k0, k1, direction, c3_z, index, c3, scale,
            factor_of_x, WEIGHT, FACTOR, DRAWS, DECAY, STOCHASTIC, COUNT, DP4A, EMULATE, True,
        )  # fmt: skip
