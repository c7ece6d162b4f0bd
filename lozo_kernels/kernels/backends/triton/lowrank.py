"""The kernels of lowrank_update, factor_update and factor_momentum. A program works on one tile of a matrix.

U is regenerated per tile; the product runs on tensor cores. Factors are multiples of 2^-8 below 4.9, so fp16 holds them and the
fp32 sums are exact in any order (docs/noise.md).
"""

import functools

import torch
import triton
import triton.language as tl

from .arithmetic import times
from .noise import STREAM_U, draw_words, factor, rounding_any, rounding_rows, rounding_words, seed_words
from .plans import FACTOR_ROWS, SCALARS, WEIGHTS, Plan, Target, UpdateKind, factor_width, padded, registers_of
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .tilesizes import TileSize
from .weights import as_fp32, read_any, read_weights, store_any, store_stochastic, store_weights
from .work import Work


@triton.jit
def random_bits(
    header, element, tensor_id, k0, k1, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Returns (ROWS, COLS) rounding bits; ``element`` (ROWS, 1) is the flat index of the block's first column in every row."""
    index, c3 = rounding_words(header)
    if ALIGNED:
        return rounding_rows(element, index, tensor_id, c3, k0, k1, ROWS, COLS)
    else:
        return rounding_any(element + tl.arange(0, COLS)[None, :], index, tensor_id, c3, k0, k1)


@triton.jit
def draw_factor(
    header, tensor_id, first, k0, k1, DRAW: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    DP4A: tl.constexpr,
):  # fmt: skip
    """Returns U of one draw for the rows of a tile, (ROWS, PADDED) fp16, exact."""
    direction, c3 = draw_words(header, DRAW, STREAM_U)
    return factor(first, tensor_id, direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A).to(tl.float16)


@triton.jit
def store_by_eight(
    x, y, bits, start, row_mask, end,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Stores a block of 16-bit weights. Straight from a matrix layout Triton would store 64 bits at a time; in this shape it stores
    128."""
    by_eight = start + tl.arange(0, COLS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    pointer = x[:, :, None] + by_eight[None, :, :]
    mask = None
    if MASKED:
        mask = row_mask[:, None, None] & (by_eight < end)[None, :, :]
    y = y.reshape(ROWS, COLS // 8, 8)
    if STOCHASTIC:
        store_stochastic(pointer, y, bits.reshape(ROWS, COLS // 8, 8), mask)
    else:
        store_weights(pointer, y, mask, EMULATE)


@triton.jit
def update_block(
    x, y, start, row_mask, end, v_matrix, width, u0, u1, scale0, scale1, factor_of_x,
    flat, header, tensor_id, k0, k1, address, code,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, EIGHTS: tl.constexpr,
    DP4A: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Updates a block of ROWS by COLS that was read as ``y``; ``x`` are pointers to its rows, or offsets where WEIGHT is None.

    MASKED: some of its rows or columns do not exist. Masks cost an instruction for every other element.
    """
    ks = tl.arange(0, PADDED)
    cols = start + tl.arange(0, COLS)
    v_block_pointer = v_matrix + ks.to(tl.int64)[:, None] * width + cols[None, :]
    mask = None
    col_mask = None
    if MASKED:
        col_mask = cols < end
        mask = row_mask[:, None] & col_mask[None, :]
        v_block = tl.load(v_block_pointer, mask=(ks[:, None] < RANK) & col_mask[None, :], other=0.0)
    elif RANK < PADDED:
        v_block = tl.load(v_block_pointer, mask=(ks[:, None] < RANK) & (cols[None, :] < end), other=0.0)
    else:
        v_block = tl.load(v_block_pointer)
    if DECAY:
        y = times(y, factor_of_x, DP4A)
    y = y + times(tl.dot(u0, v_block), scale0, DP4A)
    if DRAWS == 2:
        y = y + times(tl.dot(u1, v_block), scale1, DP4A)
    bits = 0
    if STOCHASTIC and tl.float32 != WEIGHT:
        bits = random_bits(header, flat + start, tensor_id, k0, k1, WEIGHT is not None, ROWS, COLS)
    if WEIGHT is None:
        store_any(address, x + cols[None, :], y, bits, mask, code, STOCHASTIC, EMULATE)
    elif EIGHTS:
        store_by_eight(x, y, bits, start, row_mask, end, STOCHASTIC, ROWS, COLS, EMULATE, MASKED)
    elif STOCHASTIC and tl.float32 != WEIGHT:
        store_stochastic(x + cols[None, :], y, bits, mask)
    else:
        store_weights(x + cols[None, :], y, mask, EMULATE)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=SCALARS)
def lowrank_update(
    tiles, tensors, header, scales, decay, count,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr,
    STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr, EIGHTS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The kernel of lowrank_update.

    A program updates one tile of ROWS by BLOCKS * COLS. WEIGHT None: any dtype, read per tensor, and any alignment.
    """
    ALIGNED: tl.constexpr = WEIGHT is not None
    t, matrix, row0, block0 = tile_at(tiles, tl.program_id(0))
    address, batch_stride, row_stride = weights_at(tensors, t, ALIGNED)
    v, _ = factors_at(tensors, t, ALIGNED)
    height, width = extent_at(tensors, t, ALIGNED)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    matrix = matrix.to(tl.int64)
    height32 = height.to(tl.int32)
    width32 = width.to(tl.int32)
    if ALIGNED:
        v = tl.multiple_of(v, 16)
        batch_stride = tl.multiple_of(batch_stride, 8)
        row_stride = tl.multiple_of(row_stride, 8)
        width = tl.multiple_of(width, 8)
        width32 = tl.multiple_of(width32, 8)
    rows = row0 + tl.arange(0, ROWS)
    row_mask = rows < height32
    row_begins = matrix * batch_stride + rows.to(tl.int64)[:, None] * row_stride
    col0 = block0 * (BLOCKS * COLS)
    end = tl.minimum(width32, col0 + BLOCKS * COLS)
    x = row_begins
    code = 0
    if ALIGNED:
        x = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)), 16) + row_begins
    else:
        code = dtype_at(tensors, t)
    if AHEAD:  # the first block is read while U is made, every other one while the block before it is worked on
        cols = col0 + tl.arange(0, COLS)
        ahead = read_weights(x + cols[None, :], row_mask[:, None] & (cols < end)[None, :])
    global_row = row_offset + matrix * height + row0
    first = global_row.to(tl.uint32)
    u0 = draw_factor(header, tensor_id, first, k0, k1, 0, ROWS, RANK, PADDED, DP4A)
    u1 = u0
    scale0 = tl.load(scales + t)
    # Values that a variant does not use need a placeholder.
    scale1 = scale0
    factor_of_x = scale0
    if DRAWS == 2:
        u1 = draw_factor(header, tensor_id, first, k0, k1, 1, ROWS, RANK, PADDED, DP4A)
        scale1 = tl.load(scales + count + t)
    if DECAY:
        factor_of_x = tl.load(decay + t)
    v_matrix = v + matrix * RANK * width
    if ALIGNED:
        v_matrix = tl.multiple_of(v_matrix, 16)
    flat = (global_row + tl.arange(0, ROWS).to(tl.int64)[:, None]) * global_cols + col_offset
    full = 0
    if ALIGNED:
        full = tl.where(row0 + ROWS <= height32, (end - col0) // COLS, 0)
        for block in range(0, full):
            start = col0 + block * COLS
            cols = start + tl.arange(0, COLS)
            if AHEAD:
                y = as_fp32(ahead, EMULATE)
                ahead = read_weights(x + (cols + COLS)[None, :], (cols + COLS < end)[None, :])
            else:
                y = as_fp32(read_weights(x + cols[None, :], None), EMULATE)
            update_block(
                x, y, start, row_mask, end, v_matrix, width, u0, u1, scale0, scale1, factor_of_x,
                flat, header, tensor_id, k0, k1, address, code,
                WEIGHT, RANK, PADDED, DRAWS, DECAY, STOCHASTIC, ROWS, COLS, EIGHTS, DP4A, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (end - col0 + COLS - 1) // COLS):
        start = col0 + block * COLS
        cols = start + tl.arange(0, COLS)
        mask = row_mask[:, None] & (cols < end)[None, :]
        if AHEAD:
            y = as_fp32(ahead, EMULATE)
            ahead = read_weights(x + (cols + COLS)[None, :], row_mask[:, None] & (cols + COLS < end)[None, :])
        elif ALIGNED:
            y = as_fp32(read_weights(x + cols[None, :], mask), EMULATE)
        else:
            y = read_any(address, x + cols[None, :], mask, code, EMULATE)
        update_block(
            x, y, start, row_mask, end, v_matrix, width, u0, u1, scale0, scale1, factor_of_x,
            flat, header, tensor_id, k0, k1, address, code,
            WEIGHT, RANK, PADDED, DRAWS, DECAY, STOCHASTIC, ROWS, COLS, EIGHTS, DP4A, EMULATE, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=SCALARS)
def factor_update(
    tiles, tensors, header, scales, decay, coefficients, alpha, beta, count,
    MOMENTUM: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr,
    ROWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """The kernel of factor_update and, with MOMENTUM, of factor_momentum. ROWS rows per program.

    The factors of a table may have several ranks, up to RANK.
    """
    t, matrix, row0, _ = tile_at(tiles, tl.program_id(0))
    address, batch_stride, row_stride = weights_at(tensors, t, False)
    _, n = factors_at(tensors, t, False)
    height, width = extent_at(tensors, t, False)
    tensor_id, row_offset, _, _ = place_at(tensors, t)
    k0, k1 = seed_words(header)
    matrix = matrix.to(tl.int64)
    first = (row_offset + matrix * height + row0).to(tl.uint32)
    rows = (row0 + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    ks = tl.arange(0, PADDED)[None, :]
    mask = (rows < height) & (ks < width)
    pointer = address.to(tl.pointer_type(tl.float32)) + matrix * batch_stride + rows * row_stride + ks
    value = tl.load(pointer, mask=mask, other=0.0)
    if DECAY:
        value = times(value, tl.load(decay + t), DP4A)
    carried = value
    n_pointer = n + (matrix * height + rows) * width + ks
    if MOMENTUM:
        carried = times(tl.load(n_pointer, mask=mask, other=0.0), tl.load(beta + t), DP4A)
    for d in tl.static_range(DRAWS):
        direction, c3 = draw_words(header, d, STREAM_U)
        u = factor(first, tensor_id, direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A)
        value = value + times(u, tl.load(scales + d * count + t), DP4A)
        if MOMENTUM:
            carried = carried + times(u, tl.load(coefficients + d * count + t), DP4A)
    if MOMENTUM:
        tl.store(n_pointer, carried, mask=mask)
        value = value + times(carried, tl.load(alpha + t), DP4A)
    tl.store(pointer, value, mask=mask)


def lowrank_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of the pass over low-rank tensors; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": WEIGHTS[dtype],
        "RANK": kind.rank,
        "PADDED": padded(kind.rank),
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "STOCHASTIC": kind.stochastic,
        "ROWS": size.rows,
        "COLS": size.cols,
        "BLOCKS": size.blocks,
        "AHEAD": size.ahead and dtype is not None,
        "EIGHTS": target.eights and dtype is not None and dtype.itemsize == 2,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(lowrank_update, constants, size.num_warps, registers_of(size, target))


@functools.cache
def factor_update_plan(rank: int, draws: int, decay: bool, momentum: bool, target: Target) -> Plan:
    """The plan that updates factors, with ``momentum`` their N too."""
    constants = {
        "MOMENTUM": momentum,
        "RANK": rank,
        "PADDED": factor_width(rank),
        "DRAWS": draws,
        "DECAY": decay,
        "ROWS": FACTOR_ROWS,
        "DP4A": target.dp4a,
    }
    return Plan(factor_update, constants)


def launch_lowrank(work: Work) -> None:
    """Launches lowrank_update."""
    call = work.call
    for plan, tiles in work.over_weights(lowrank_plan):
        work.launch(plan, tiles, work.header, call.scales, work.or_unused(call.decay), len(work.table))


def launch_factor_update(work: Work) -> None:
    """Launches factor_update or factor_momentum."""
    call, rank = work.call, max((x.shape[2] for x in work.table.x), default=1)
    plan = factor_update_plan(rank, len(call.draws), call.decay is not None, work.op.momentum, work.target)
    scalars = (call.scales, *map(work.or_unused, (call.decay, call.coefficients, call.alpha, call.beta)))
    work.launch(plan, work.rows(), work.header, *scalars, len(work.table))
