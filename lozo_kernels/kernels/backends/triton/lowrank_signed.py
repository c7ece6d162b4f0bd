"""The kernel of lowrank_signed_update. A program works on one tile of a matrix.

The signs of the rows and the columns are made before, for a whole table, and read as fp32: made in the kernel they would cost a
counter for every few signs of each tile, and read as bits four instructions for each.
"""

import torch
import triton
import triton.language as tl

from ... import noise
from ...table import TensorTable
from .arithmetic import fma, times
from .lowrank import random_bits, store_by_eight
from .noise import STREAM_U, draw_words, factor, seed_words
from .plans import ALL_REGISTERS, SCALARS, WEIGHTS, Plan, Target, UpdateKind, padded, registers_of
from .tables import dtype_at, extent_at, factors_at, place_at, tile_at, weights_at
from .tilesizes import TileSize
from .weights import as_fp32, read_any, read_weights, store_any, store_stochastic, store_weights
from .work import Work


@triton.jit
def signed_scales(y, r, s, length, scales, count, parts):
    """Returns Q of a block: the sum over parts, ascending, of scale * r s^T. The products are exact, so a sum is rounded once.

    ``r`` and ``s`` are pointers to the first part's signs; the next part's are ``length`` further.
    """
    # A product fused with -0 is the product. The condition never holds; it makes Triton lay the sum out over the threads as y is.
    q = tl.where(parts < 0, y, -0.0)
    for _ in range(0, parts):
        q = fma((tl.load(r) * tl.load(scales))[:, None], tl.load(s)[None, :], q, False)
        r += length
        s += length
        scales += count
    return q


@triton.jit
def signed_block(
    x, start, row_mask, end, v_matrix, width, u, r, s, length, scales, count, parts, factor_of_x, flat, header, tensor_id, k0, k1,
    address, code,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EIGHTS: tl.constexpr, DP4A: tl.constexpr, EMULATE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Updates a block of ROWS by COLS; ``x`` are pointers to its rows, or offsets where WEIGHT is None.

    MASKED: some of its rows or columns do not exist.
    """
    ks = tl.arange(0, PADDED)
    cols = start + tl.arange(0, COLS)
    mask = None
    if MASKED:
        mask = row_mask[:, None] & (cols < end)[None, :]
    v_mask = (ks[:, None] < RANK) & (cols < end)[None, :]
    v_block = tl.load(v_matrix + ks.to(tl.int64)[:, None] * width + cols[None, :], mask=v_mask, other=0.0)
    if WEIGHT is None:
        y = read_any(address, x + cols[None, :], mask, code, EMULATE)
    else:
        y = as_fp32(read_weights(x + cols[None, :], mask), EMULATE)
    if DECAY:
        y = times(y, factor_of_x, DP4A)
    q = signed_scales(y, r, s, length, scales, count, parts)
    y = y + times(tl.dot(u, v_block), q, DP4A)
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


@triton.jit(do_not_specialize=["count", "parts"], do_not_specialize_on_alignment=SCALARS)
def lowrank_signed_update(
    tiles, tensors, header, scales, decay, signs, bases, count, parts, length,
    WEIGHT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, DECAY: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCKS: tl.constexpr, EIGHTS: tl.constexpr, DP4A: tl.constexpr,
    EMULATE: tl.constexpr,
):  # fmt: skip
    """The kernel of lowrank_signed_update.

    ``signs`` are (parts, length); bases[t] and bases[count + t] say where in them tensor t's global row 0 and column 0 are. A
    program updates one tile of ROWS by BLOCKS * COLS. WEIGHT None: any dtype, read per tensor, and any alignment.
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
    x = matrix * batch_stride + rows.to(tl.int64)[:, None] * row_stride
    code = 0
    if ALIGNED:
        x = tl.multiple_of(address.to(tl.pointer_type(WEIGHT)), 16) + x
    else:
        code = dtype_at(tensors, t)
    factor_of_x = 1.0
    if DECAY:
        factor_of_x = tl.load(decay + t)
    global_row = row_offset + matrix * height + row0
    _, c3 = draw_words(header, 0, STREAM_U)  # U has direction 0, whatever part is the first
    u = factor(global_row.to(tl.uint32), tensor_id, 0, c3, k0, k1, ROWS, RANK, PADDED, DP4A).to(tl.float16)
    # Rows and columns beyond the last have the signs of the last, which are there to be read.
    last_row = row_offset + matrix * height + tl.minimum(rows, height32 - 1).to(tl.int64)
    r = signs + tl.load(bases + t) + last_row
    first_col = tl.load(bases + count + t) + col_offset + matrix * global_cols
    if ALIGNED:
        first_col = tl.multiple_of(first_col, 8)
        signs = tl.multiple_of(signs, 16)
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
            start = col0 + block * COLS
            s = signs + first_col + (start + tl.arange(0, COLS))
            signed_block(
                x, start, row_mask, end, v_matrix, width, u, r, s, length, scales + t, count, parts, factor_of_x, flat,
                header, tensor_id, k0, k1, address, code,
                WEIGHT, RANK, PADDED, DECAY, STOCHASTIC, ROWS, COLS, EIGHTS, DP4A, EMULATE, False,
            )  # fmt: skip
    for block in range(full, (end - col0 + COLS - 1) // COLS):
        start = col0 + block * COLS
        s = signs + first_col + tl.minimum(start + tl.arange(0, COLS), width32 - 1)
        signed_block(
            x, start, row_mask, end, v_matrix, width, u, r, s, length, scales + t, count, parts, factor_of_x, flat,
            header, tensor_id, k0, k1, address, code,
            WEIGHT, RANK, PADDED, DECAY, STOCHASTIC, ROWS, COLS, EIGHTS, DP4A, EMULATE, True,
        )  # fmt: skip


def lowrank_signed_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of the pass; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": WEIGHTS[dtype],
        "RANK": kind.rank,
        "PADDED": padded(kind.rank),
        "DECAY": kind.decay,
        "STOCHASTIC": kind.stochastic,
        "ROWS": size.rows,
        "COLS": size.cols,
        "BLOCKS": size.blocks,
        "EIGHTS": target.eights and dtype is not None and dtype.itemsize == 2,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(lowrank_signed_update, constants, size.num_warps, registers_of(size, target, ALL_REGISTERS))


def launch_lowrank_signed(work: Work) -> None:
    """Makes all signs, and launches lowrank_signed_update."""
    call, count, prepared = work.call, len(work.table), work.on_device.prepared
    places, bases = prepared.get("signs") or prepared.setdefault("signs", _places(work.table))
    (draw,), parts = call.draws, len(call.scales)
    words = noise.sign_words(call.seed, places, draw.step, parts, direction=draw.direction, device=work.device)
    length = 32 * words.shape[1]
    signs = torch.empty(parts, length, dtype=torch.float32, device=work.device)
    for i in range(parts):  # one by one, so that the memory on the way to fp32 is that of one part
        signs[i] = noise.unpack_signs(words[i : i + 1], 0, length)
    arguments = (work.header, call.scales, work.or_unused(call.decay), signs, bases, count, parts, length)
    for plan, tiles in work.over_weights(lowrank_signed_plan):
        work.launch(plan, tiles, *arguments)


def _places(table: TensorTable) -> tuple[list[tuple[int, str, int, int]], torch.Tensor]:
    """Where the signs of a table's rows and columns are in the noise, and where among those of a part each tensor's global row 0
    and column 0 are, (2 * tensors,) int64 on its device."""
    places = []
    for x, i, row in zip(table.x, table.tensor_ids, table.row_offsets, strict=True):
        places.append((i, "row signs", row, x.shape[0] * x.shape[1]))
    for x, i, col, width in zip(table.x, table.tensor_ids, table.col_offsets, table.global_cols, strict=True):
        places.append((i, "column signs", col, max(0, x.shape[0] - 1) * width + x.shape[2]))
    bases, counters = [], 0
    for _, _, first, length in places:
        bases.append((counters - (first >> 7)) * 128)
        counters += noise.sign_counters(first, length)
    return places, torch.tensor(bases, dtype=torch.int64, device="cpu").to(table.device)
