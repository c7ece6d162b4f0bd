"""The kernel of dense_merge. A program works on a stretch of one row."""

import torch
import triton
import triton.language as tl

from .arithmetic import times
from .noise import dense_any, dense_block, dense_words, rounding_any, rounding_block, rounding_words, seed_words
from .plans import HALF_THE_REGISTERS, SCALARS, WEIGHTS, Plan, Target, UpdateKind, registers_of
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .tilesizes import TileSize
from .weights import as_fp32, read_any, read_bf16_pairs, read_weights, store_any, store_stochastic, store_weights
from .work import Work


@triton.jit
def dense_merge_block(
    address, x, out_address, out, n, first, block, left, code, tensor_id, k0, k1, direction, c3_z, index, c3, scale, factor_of_x,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, SIGNS: tl.constexpr,
    STOCHASTIC: tl.constexpr, COUNT: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr, MASKED: tl.constexpr,
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
        y = times(y, factor_of_x, DP4A)
    if DRAWS == 1:
        if ALIGNED:
            z = dense_block(first, block * COUNT, direction, tensor_id, c3_z, k0, k1, COUNT, SIGNS, DP4A)
        else:
            z = dense_any(first + cols, direction, tensor_id, c3_z, k0, k1, SIGNS, DP4A)
        term = times(z, scale, DP4A)
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


@triton.jit(do_not_specialize_on_alignment=SCALARS)
def dense_merge(
    tiles, tensors, outputs, header, scales, decay,
    WEIGHT: tl.constexpr, FACTOR: tl.constexpr, DRAWS: tl.constexpr, DECAY: tl.constexpr, SIGNS: tl.constexpr,
    STOCHASTIC: tl.constexpr, COUNT: tl.constexpr, BLOCKS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
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
    direction, c3_z = dense_words(header, 0, SIGNS)
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
                factor_of_x, WEIGHT, FACTOR, DRAWS, DECAY, SIGNS, STOCHASTIC, COUNT, DP4A, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (left + COUNT - 1) // COUNT):
        dense_merge_block(
            address, x, out_address, out, n, first, block, left, code, tensor_id, k0, k1, direction, c3_z, index, c3, scale,
            factor_of_x, WEIGHT, FACTOR, DRAWS, DECAY, SIGNS, STOCHASTIC, COUNT, DP4A, EMULATE, True,
        )  # fmt: skip


def dense_merge_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of a merge of dense tensors, with N if ``kind.momentum``; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": WEIGHTS[dtype],
        "FACTOR": kind.momentum,
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "SIGNS": kind.signs,
        "STOCHASTIC": kind.stochastic,
        "COUNT": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(dense_merge, constants, size.num_warps, registers_of(size, target, HALF_THE_REGISTERS))


def launch_dense_merge(work: Work) -> None:
    """Launches dense_merge."""
    call = work.call
    for plan, tiles in work.over_weights(dense_merge_plan):
        work.launch(plan, tiles, work.on_device.outputs, work.header, call.scales, work.or_unused(call.decay))
