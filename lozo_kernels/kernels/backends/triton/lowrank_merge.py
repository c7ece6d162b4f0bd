"""The kernels of lowrank_merge. A program works on one tile of a matrix.

N holds any fp32 number, so the product is a chain of fused multiply-adds with k ascending, without tensor cores.
"""

import functools

import torch
import triton
import triton.language as tl

from .arithmetic import fma, times
from .lowrank import random_bits
from .noise import STREAM_U, draw_words, factor, factor_quad, seed_words
from .plans import (
    ALL_REGISTERS,
    FACTOR_ROWS,
    HALF_THE_REGISTERS,
    SCALARS,
    WEIGHTS,
    Plan,
    Target,
    UpdateKind,
    factor_width,
    registers_of,
)
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .tilesizes import TileSize
from .weights import as_fp32, read_any, read_weights, store_any, store_stochastic, store_weights
from .work import Work

REGISTER_RANK = tl.constexpr(16)  # up to this rank the columns of N + scale * U stay in registers for a whole tile


@triton.jit
def factor_columns(factor_row, row_mask, RANK: tl.constexpr):
    """Returns the columns of a factor for the rows of a tile, each a tensor. They stay in registers for the whole tile."""
    columns = (tl.load(factor_row, mask=row_mask, other=0.0),)
    for k in tl.static_range(1, RANK):
        columns = columns + (tl.load(factor_row + k, mask=row_mask, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return columns


@triton.jit
def factor_product(
    columns, v_matrix, cols, col_mask, width, RANK: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """Returns F V^T of a block, (rows, cols) fp32, with k ascending: a rounded product, then a fused multiply-add for each k."""
    pointer = v_matrix + cols
    acc = times(columns[0][:, None], tl.load(pointer, mask=col_mask).to(tl.float32)[None, :], DP4A)
    for k in tl.static_range(1, RANK):
        pointer += width
        acc = fma(columns[k][:, None], tl.load(pointer, mask=col_mask).to(tl.float32)[None, :], acc, EMULATE)
    return acc


@triton.jit
def merged_quad(
    n_row, row_mask, global_rows, quad, direction, tensor_id, c3, k0, k1, scale,
    COUNT: tl.constexpr, DRAWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Returns COUNT columns of N + scale * U, or without draws of N, from column 4 * quad on, for the rows of a tile."""
    columns = factor_columns(n_row + quad * 4, row_mask, COUNT)
    if DRAWS == 1:
        us = factor_quad(global_rows, global_rows * 0 + (direction + quad), tensor_id, c3, k0, k1, DP4A)
        probed = (columns[0] + times(us[0], scale, DP4A),)
        for k in tl.static_range(1, COUNT):
            probed = probed + (columns[k] + times(us[k], scale, DP4A),)  # type: ignore[assignment]  # noqa: RUF005
        columns = probed
    return columns


@triton.jit
def add_columns(product, columns, pointer, col_mask, width, COUNT: tl.constexpr, EMULATE: tl.constexpr):
    """Adds the next COUNT terms to a sum like that of :func:`factor_product`; ``pointer`` is in their first row of V."""
    for k in tl.static_range(COUNT):
        v = tl.load(pointer + k * width, mask=col_mask).to(tl.float32)
        product = fma(columns[k][:, None], v[None, :], product, EMULATE)
    return product


@triton.jit
def wide_product(
    x, factor_row, row_mask, v_matrix, cols, col_mask, width, quads, RANK: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """Returns F V^T of a block, with four columns of F in registers at a time.

    ``quads`` is RANK // 4, but no constant: the compiler would unroll the loop and want registers for all columns at once.
    """
    # A product fused with -0 is the rounded product. The condition never holds; it makes Triton lay the sum out over the threads as
    # x is.
    product = tl.where(quads < 0, x, -0.0)
    for quad in range(0, quads):
        columns = factor_columns(factor_row + quad * 4, row_mask, 4)
        product = add_columns(product, columns, v_matrix + quad * 4 * width + cols, col_mask, width, 4, EMULATE)
    REST: tl.constexpr = RANK % 4
    if REST > 0:
        columns = factor_columns(factor_row + quads * 4, row_mask, REST)
        product = add_columns(product, columns, v_matrix + quads * 4 * width + cols, col_mask, width, REST, EMULATE)
    return product


@triton.jit(do_not_specialize_on_alignment=SCALARS)
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
    value = tl.load(n + at, mask=mask, other=0.0) + times(u, tl.load(scales + t), DP4A)
    tl.store(factors + tl.load(starts + t) * RANK + at, value, mask=mask)


@triton.jit
def merge_block(
    x, out, start, row_mask, end, v_matrix, width, factor_row, columns, quads, factor_of_x,
    flat, header, tensor_id, k0, k1, address, out_address, code,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
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
        y = times(y, factor_of_x, DP4A)
    if RANK <= REGISTER_RANK:
        product = factor_product(columns, v_matrix, cols, col_mask, width, RANK, DP4A, EMULATE)
    else:
        product = wide_product(y, factor_row, row_mask, v_matrix, cols, col_mask, width, quads, RANK, EMULATE)
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


@triton.jit(do_not_specialize=["quads"], do_not_specialize_on_alignment=SCALARS)
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
                WEIGHT, RANK, DECAY, STOCHASTIC, ROWS, COLS, DP4A, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (end - col0 + COLS - 1) // COLS):
        merge_block(
            x, out, col0 + block * COLS, row_mask, end, v_matrix, width, factor_row, columns, quads, factor_of_x,
            flat, header, tensor_id, k0, k1, address, out_address, code,
            WEIGHT, RANK, DECAY, STOCHASTIC, ROWS, COLS, DP4A, EMULATE, True,
        )  # fmt: skip


def is_wide(rank: int) -> bool:
    """Whether a merge keeps no columns of its factor in registers. Then :func:`probed_factor` goes before one with a draw."""
    return rank > REGISTER_RANK.value


@functools.cache
def probed_factor_plan(rank: int, target: Target) -> Plan:
    """The plan that writes N + scale * U to scratch memory before a merge of a high rank."""
    return Plan(probed_factor, {"RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS, "DP4A": target.dp4a})


def lowrank_merge_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of a merge of low-rank tensors; ``dtype`` None means any dtype and alignment."""
    rank = kind.rank
    constants = {
        "WEIGHT": WEIGHTS[dtype],
        "RANK": rank,
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "STOCHASTIC": kind.stochastic,
        "ROWS": size.rows,
        "COLS": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    large = dtype == torch.float32 or kind.stochastic or rank > 8
    registers = ALL_REGISTERS if large else HALF_THE_REGISTERS
    return Plan(lowrank_merge, constants, size.num_warps, registers_of(size, target, registers))


def launch_lowrank_merge(work: Work) -> None:
    """Launches lowrank_merge."""
    call, rank = work.call, work.table.rank
    factors, starts = call.scales, work.on_device.tensors  # placeholders for pointers that the kernel does not read
    if call.draws and is_wide(rank):
        starts, rows = work.on_device.factor_starts()
        factors = torch.empty(rows * rank, dtype=torch.float32, device=work.table.device)
        work.launch(probed_factor_plan(rank, work.target), work.rows(), work.header, call.scales, factors, starts)
    arguments = (work.header, call.scales, work.or_unused(call.decay), factors, starts, rank // 4)
    for plan, tiles in work.over_weights(lowrank_merge_plan):
        work.launch(plan, tiles, work.on_device.outputs, *arguments)
