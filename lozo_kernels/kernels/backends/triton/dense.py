"""The kernel of dense_update and dense_momentum. A program works on a stretch of one row."""

import torch
import triton
import triton.language as tl

from .arithmetic import times
from .noise import dense_any, dense_block, dense_words, rounding_any, rounding_block, rounding_words, seed_words
from .plans import SCALARS, WEIGHTS, Plan, Target, UpdateKind, registers_of
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .tilesizes import TileSize
from .weights import as_fp32, read_any, read_bf16_pairs, read_weights, store_any, store_stochastic, store_weights
from .work import Work


@triton.jit
def update_block(
    address, x, n, first, block, left, code, tensor_id, k0, k1, direction0, c3_0, direction1, c3_1, index, c3,
    scale0, scale1, factor_of_x, coefficient0, coefficient1, rate, keep,
    WEIGHT: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, SIGNS: tl.constexpr, MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr, COUNT: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Updates COUNT elements; with MASKED, those below ``left``. ``x`` is a pointer, or an offset where WEIGHT is None."""
    ALIGNED: tl.constexpr = WEIGHT is not None
    cols = block * COUNT + tl.arange(0, COUNT)
    mask = None
    half_mask = None
    if MASKED:
        mask = cols < left
        half_mask = block * (COUNT // 2) + tl.arange(0, COUNT // 2) < left // 2
    if ALIGNED:
        if tl.bfloat16 == WEIGHT:
            y = read_bf16_pairs(x, block * COUNT, half_mask, COUNT)
        else:
            y = as_fp32(read_weights(x + cols, mask), EMULATE)
        z0 = dense_block(first, block * COUNT, direction0, tensor_id, c3_0, k0, k1, COUNT, SIGNS, DP4A)
        if DRAWS == 2:
            z1 = dense_block(first, block * COUNT, direction1, tensor_id, c3_1, k0, k1, COUNT, SIGNS, DP4A)
    else:
        y = read_any(address, x + cols, mask, code, EMULATE)
        z0 = dense_any(first + cols, direction0, tensor_id, c3_0, k0, k1, SIGNS, DP4A)
        if DRAWS == 2:
            z1 = dense_any(first + cols, direction1, tensor_id, c3_1, k0, k1, SIGNS, DP4A)
    if DECAY:
        y = times(y, factor_of_x, DP4A)
    y = y + times(z0, scale0, DP4A)
    if DRAWS == 2:
        y = y + times(z1, scale1, DP4A)
    if MOMENTUM:
        m = times(tl.load(n + cols, mask=mask), keep, DP4A)
        m = m + times(z0, coefficient0, DP4A)
        if DRAWS == 2:
            m = m + times(z1, coefficient1, DP4A)
        tl.store(n + cols, m, mask=mask)
        y = y + times(m, rate, DP4A)
    bits = 0
    if STOCHASTIC:
        if ALIGNED:
            bits = rounding_block(first, block * COUNT, index, tensor_id, c3, k0, k1, COUNT)
        else:
            bits = rounding_any(first + cols, index, tensor_id, c3, k0, k1)
    if not ALIGNED:
        store_any(address, x + cols, y, bits, mask, code, STOCHASTIC, EMULATE)
    elif STOCHASTIC and tl.float32 != WEIGHT:
        store_stochastic(x + cols, y, bits, mask)
    else:
        store_weights(x + cols, y, mask, EMULATE)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=SCALARS)
def dense_update(
    tiles, tensors, header, scales, decay, coefficients, alpha, beta, count,
    WEIGHT: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, SIGNS: tl.constexpr, MOMENTUM: tl.constexpr,
    STOCHASTIC: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """The kernel of dense_update and, with MOMENTUM, of dense_momentum.

    A program updates BLOCKS * COUNT elements of one row. WEIGHT None: any dtype, read per tensor, and any alignment.
    """
    ALIGNED: tl.constexpr = WEIGHT is not None
    t, matrix, row, block0 = tile_at(tiles, tl.program_id(0))
    address, batch_stride, row_stride = weights_at(tensors, t, ALIGNED)
    _, n = factors_at(tensors, t, ALIGNED)
    height, width = extent_at(tensors, t, ALIGNED)
    tensor_id, row_offset, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    direction0, c3_0 = dense_words(header, 0, SIGNS)
    direction1, c3_1 = dense_words(header, 1, SIGNS)
    index, c3 = rounding_words(header)
    local_row = matrix.to(tl.int64) * height + row
    col0 = block0.to(tl.int64) * (BLOCKS * COUNT)
    begin = matrix.to(tl.int64) * batch_stride + row.to(tl.int64) * row_stride + col0
    n = n + local_row * width + col0
    first = (row_offset + local_row) * global_cols + col_offset + col0
    left = tl.minimum(width - col0, BLOCKS * COUNT).to(tl.int32)
    x = begin
    code = 0
    if ALIGNED:
        x = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)) + begin, 16)
        n = tl.multiple_of(n, 16)
        left = tl.multiple_of(left, 8)
    else:
        code = dtype_at(tensors, t)
    scale0 = tl.load(scales + t)
    scale1 = scale0
    factor_of_x = scale0
    rate = scale0
    keep = scale0
    coefficient0 = scale0
    coefficient1 = scale0
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
    full = left // COUNT
    if ALIGNED:
        for block in range(0, full):  # without masks, which cost an instruction for every other element
            update_block(
                address, x, n, first, block, left, code, tensor_id, k0, k1, direction0, c3_0, direction1, c3_1, index, c3,
                scale0, scale1, factor_of_x, coefficient0, coefficient1, rate, keep,
                WEIGHT, DRAWS, DECAY, SIGNS, MOMENTUM, STOCHASTIC, COUNT, DP4A, EMULATE, False,
            )  # fmt: skip
        if full * COUNT < left:
            update_block(
                address, x, n, first, full, left, code, tensor_id, k0, k1, direction0, c3_0, direction1, c3_1, index, c3,
                scale0, scale1, factor_of_x, coefficient0, coefficient1, rate, keep,
                WEIGHT, DRAWS, DECAY, SIGNS, MOMENTUM, STOCHASTIC, COUNT, DP4A, EMULATE, True,
            )  # fmt: skip
    else:
        for block in range(0, (left + COUNT - 1) // COUNT):
            update_block(
                address, x, n, first, block, left, code, tensor_id, k0, k1, direction0, c3_0, direction1, c3_1, index, c3,
                scale0, scale1, factor_of_x, coefficient0, coefficient1, rate, keep,
                WEIGHT, DRAWS, DECAY, SIGNS, MOMENTUM, STOCHASTIC, COUNT, DP4A, EMULATE, True,
            )  # fmt: skip


def dense_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of the pass over dense tensors; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": WEIGHTS[dtype],
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "SIGNS": kind.signs,
        "MOMENTUM": kind.momentum,
        "STOCHASTIC": kind.stochastic,
        "COUNT": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(dense_update, constants, size.num_warps, registers_of(size, target))


def launch_dense(work: Work) -> None:
    """Launches dense_update or dense_momentum."""
    call = work.call
    scalars = (call.scales, *[work.or_unused(x) for x in (call.decay, call.coefficients, call.alpha, call.beta)])
    for plan, tiles in work.over_weights(dense_plan):
        work.launch(plan, tiles, work.header, *scalars, len(work.table))
