"""The kernels of lowrank_linear, Y <- gain * Y + (X W) W'^T + shift, and of lowrank_embedding.

W and W' are V and B + scale * U, or the other way round. The contraction writes P = X W to scratch memory (for an embedding the
look-up writes its rows), and the expansion adds P W'^T. Nothing is summed by atomics: the parts of long rows lie side by side in
the scratch memory, and the expansion adds them in order.

Products run on tensor cores, which keep 11 bits of an fp32 number (TF32). V, bf16 and fp16 have no more. Other numbers are split
in two parts, which leaves an error of 2^-22.
"""

import triton
import triton.language as tl

from .noise import STREAM_U, factor_at
from .plans import SCALARS
from .weights import as_fp32, read_activations, read_weights, store_weights

NUMBERS = ("seed_low", "seed_high", "tensor_id", "row_offset", "size")  # of every kernel here; none is compiled once more for one


@triton.jit
def halves(x):
    """Returns x as the sum of its upper 11 bits and the rest."""
    high = (x.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def add_product(total, a, b, A_SHORT: tl.constexpr, B_SHORT: tl.constexpr, TF32: tl.constexpr):
    """Returns total + a b in fp32. SHORT: the values have 11 bits."""
    if not TF32:
        return tl.dot(a, b, total, input_precision="ieee")
    a_high = a
    b_high = b
    if not A_SHORT:
        a_high, a_low = halves(a)
    if not B_SHORT:
        b_high, b_low = halves(b)
        total = tl.dot(a_high, b_low, total, input_precision="tf32")
    if not A_SHORT:
        total = tl.dot(a_low, b_high, total, input_precision="tf32")
    return tl.dot(a_high, b_high, total, input_precision="tf32")


@triton.jit
def v_block(v, cols, width, RANK: tl.constexpr, PADDED: tl.constexpr):
    """Returns (cols, PADDED) fp32 of V; zero outside of it."""
    ks = tl.arange(0, PADDED)
    mask = (cols < width)[:, None] & (ks < RANK)[None, :]
    return tl.load(v + ks.to(tl.int64)[None, :] * width + cols[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def factor_block(
    b, rows, height, draws, scales, group, seed_low, seed_high, tensor_id, row_offset,
    ROWS: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Returns (ROWS, PADDED) fp32 of a group's B + scale * U at some rows (int32 or int64); zero outside of it."""
    ks = tl.arange(0, PADDED)
    mask = ((rows >= 0) & (rows < height))[:, None] & (ks < RANK)[None, :]
    c3 = tl.load(draws + group * 2).to(tl.uint32) | (STREAM_U << 28)
    direction = tl.load(draws + group * 2 + 1).to(tl.uint32) << 8
    global_rows = row_offset.to(tl.uint32) + rows.to(tl.uint32)
    k0 = seed_low.to(tl.uint32)
    k1 = seed_high.to(tl.uint32)
    u = factor_at(global_rows, tensor_id.to(tl.uint32), direction, c3, k0, k1, ROWS, PADDED, PADDED, DP4A)
    at_rest = tl.load(b + rows.to(tl.int64)[:, None] * RANK + ks[None, :], mask=mask, other=0.0)
    return tl.where(mask, at_rest + u * tl.load(scales + group), 0.0)


@triton.jit(do_not_specialize=[*NUMBERS, "groups", "parts", "blocks"], do_not_specialize_on_alignment=SCALARS)
def contraction(
    x, v, b, draws, scales, sums, seed_low, seed_high, tensor_id, row_offset, size, groups, parts, blocks, inner, stride,
    FACTOR: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    DP4A: tl.constexpr, TF32: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """sums[part] <- X V over the columns of a part, or with FACTOR X (B + scale * U); (parts, tokens, PADDED) fp32.

    A program does TOKENS tokens of one group of ``size`` and one part, which is ``blocks`` of COLS columns.
    """
    program = tl.program_id(0)
    part = program % parts
    tiles = (size + TOKENS - 1) // TOKENS
    group = program // parts // tiles
    local = program // parts % tiles * TOKENS + tl.arange(0, TOKENS)
    tokens = group.to(tl.int64) * size + local
    token_mask = (local < size)[:, None]
    x_rows = x + tokens[:, None] * stride
    total = tl.zeros([TOKENS, PADDED], dtype=tl.float32)
    first = part * blocks
    last = tl.minimum(first + blocks, (inner + COLS - 1) // COLS)
    for block in range(first, last):
        cols = block * COLS + tl.arange(0, COLS)
        a = read_activations(x_rows + cols[None, :], token_mask & (cols < inner)[None, :])
        if FACTOR:
            w = factor_block(
                b, cols, inner, draws, scales, group, seed_low, seed_high, tensor_id, row_offset, COLS, RANK, PADDED, DP4A
            )
        else:
            w = v_block(v, cols, inner, RANK, PADDED)
        total = add_product(total, as_fp32(a, EMULATE), w, x.dtype.element_ty != tl.float32, not FACTOR, TF32)
    out = sums + (part * (groups * size).to(tl.int64) + tokens)[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    tl.store(out, total, mask=token_mask)


@triton.jit(do_not_specialize=[*NUMBERS, "height"], do_not_specialize_on_alignment=SCALARS)
def lookup(
    ids, b, draws, scales, sums, seed_low, seed_high, tensor_id, row_offset, size, height,
    RANK: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """sums <- (B + scale * U)[ids], TOKENS per program; zero for an id that is not a row of the weight."""
    program = tl.program_id(0)
    tiles = (size + TOKENS - 1) // TOKENS
    group = program // tiles
    local = program % tiles * TOKENS + tl.arange(0, TOKENS)
    tokens = group.to(tl.int64) * size + local
    rows = tl.load(ids + tokens, mask=local < size, other=0)
    found = factor_block(
        b, rows, height, draws, scales, group, seed_low, seed_high, tensor_id, row_offset, TOKENS, RANK, PADDED, DP4A
    )
    tl.store(sums + tokens[:, None] * PADDED + tl.arange(0, PADDED)[None, :], found, mask=(local < size)[:, None])


@triton.jit
def sum_parts(sums, tokens, mask, parts, all_tokens, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """Returns (tokens, PADDED) of P: its parts added in order."""
    pointer = sums + tokens[:, None] * PADDED + tl.arange(0, PADDED)[None, :]
    p = tl.load(pointer, mask=mask, other=0.0)
    if PARTS:
        for part in range(1, parts):
            p += tl.load(pointer + part * all_tokens * PADDED, mask=mask, other=0.0)
    return p


@triton.jit
def expand_block(
    y_rows, p, w, cols, mask, factor_of_y, addend,
    FACTOR: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    EIGHTS: tl.constexpr, TF32: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Writes gain * Y + P W^T + shift of a block of TOKENS by COLS; ``w`` is (PADDED, COLS)."""
    product = add_product(tl.zeros([TOKENS, COLS], dtype=tl.float32), p, w, False, not FACTOR, TF32)
    pointer = y_rows + cols[None, :]
    y = as_fp32(read_weights(pointer, mask), EMULATE)
    if GAIN:
        y = y * factor_of_y
    y = y + product
    if SHIFT:
        y = y + addend[None, :]
    if EIGHTS:  # see lowrank.update_block
        pointer = y_rows[:, :, None] + cols.reshape(COLS // 8, 8)[None, :, :]
        store_weights(pointer, y.reshape(TOKENS, COLS // 8, 8), mask.reshape(TOKENS, COLS // 8, 8), EMULATE)
    else:
        store_weights(pointer, y, mask, EMULATE)


@triton.jit(do_not_specialize=[*NUMBERS, "groups", "parts", "blocks"], do_not_specialize_on_alignment=SCALARS)
def expansion(
    y, sums, v, b, draws, scales, gain, shift, seed_low, seed_high, tensor_id, row_offset, size, groups, parts, blocks,
    outer, stride,
    FACTOR: tl.constexpr, PARTS: tl.constexpr, GAIN: tl.constexpr, SHIFT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    TOKENS: tl.constexpr, COLS: tl.constexpr, DP4A: tl.constexpr, EIGHTS: tl.constexpr, TF32: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Y <- gain * Y + P V^T + shift, or with FACTOR P (B + scale * U)^T. With PARTS, P is the sum of ``parts`` parts.

    A program updates COLS columns of ``blocks`` times TOKENS tokens of one group, for which it makes B + scale * U once.
    """
    program = tl.program_id(0)
    across = (outer + COLS - 1) // COLS
    down = (size + TOKENS - 1) // TOKENS
    stretches = (down + blocks - 1) // blocks
    group = program // across // stretches
    first = program // across % stretches * blocks
    cols = program % across * COLS + tl.arange(0, COLS)
    col_mask = cols < outer
    if FACTOR:
        w = factor_block(b, cols, outer, draws, scales, group, seed_low, seed_high, tensor_id, row_offset, COLS, RANK, PADDED, DP4A)
    else:
        w = v_block(v, cols, outer, RANK, PADDED)
    w = tl.trans(w)
    factor_of_y = 1.0
    if GAIN:
        factor_of_y = tl.load(gain)
    addend = factor_of_y
    if SHIFT:
        addend = tl.load(shift + group.to(tl.int64) * outer + cols, mask=col_mask, other=0.0)
    for block in range(first, tl.minimum(first + blocks, down)):
        local = block * TOKENS + tl.arange(0, TOKENS)
        tokens = group.to(tl.int64) * size + local
        token_mask = (local < size)[:, None]
        p = sum_parts(sums, tokens, token_mask, parts, (groups * size).to(tl.int64), PARTS, PADDED)
        expand_block(
            y + tokens[:, None] * stride, p, w, cols, token_mask & col_mask[None, :], factor_of_y, addend,
            FACTOR, GAIN, SHIFT, TOKENS, COLS, EIGHTS, TF32, EMULATE,
        )  # fmt: skip
