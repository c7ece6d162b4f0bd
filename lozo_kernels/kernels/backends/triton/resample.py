"""The kernels that make the V of a window, re-project the momentum to it, and make a factor by itself."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import Draw
from ...noise import STREAMS
from ...table import TensorTable
from ..launches import Headers, device_table
from .arithmetic import fma
from .launcher import Launcher
from .noise import STREAM_V, draw_words, factor, seed_words
from .plans import FACTOR_ROWS, Plan, Target, as_int32, factor_width, padded, target_of
from .tables import extent_at, factors_at, place_at, tile_at


@triton.jit
def resample(
    matrices, tensors, header, ratios,
    RANK: tl.constexpr, PADDED: tl.constexpr, REPROJECT: tl.constexpr, COLS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """V <- the V of a window, one matrix per program; with REPROJECT also ratios[matrix] <- V_old^T V_new / cols.

    The sums of a block are integers below 2^24 (exact in fp32), those of all blocks below 2^53 (exact in fp64).
    """
    program = tl.program_id(0)
    t, matrix, _, _ = tile_at(matrices, program)
    v, _ = factors_at(tensors, t, False)
    _, width = extent_at(tensors, t, False)
    tensor_id, _, col_offset, global_cols = place_at(tensors, t)
    k0, k1 = seed_words(header)
    direction, c3 = draw_words(header, 0, STREAM_V)
    matrix = matrix.to(tl.int64)
    v = v + matrix * RANK * width
    first = col_offset + matrix * global_cols
    ks = tl.arange(0, PADDED)
    gram = tl.zeros([PADDED, PADDED], dtype=tl.float64)
    for start in range(0, width.to(tl.int32), COLS):
        cols = start + tl.arange(0, COLS)
        new = factor((first + start).to(tl.uint32), tensor_id, direction, c3, k0, k1, COLS, RANK, PADDED, DP4A).to(tl.float16)
        mask = (cols < width)[:, None] & (ks < RANK)[None, :]
        pointer = v + ks.to(tl.int64)[None, :] * width + cols[:, None]
        if REPROJECT:
            old = tl.load(pointer, mask=mask, other=0.0)
            gram += tl.dot(tl.trans(old), new).to(tl.float64)
            tl.debug_barrier()  # an element may be stored by another thread than the one that loaded it
        tl.store(pointer, new, mask=mask)
    if REPROJECT:
        ratio = (gram / width.to(tl.float64)).to(tl.float32)
        out = ratios + program.to(tl.int64) * RANK * RANK + ks[:, None] * RANK + ks[None, :]
        tl.store(out, ratio, mask=(ks < RANK)[:, None] & (ks < RANK)[None, :])


@triton.jit
def reproject(
    tiles, tensors, ratios, RANK: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, EMULATE: tl.constexpr
):  # fmt: skip
    """N <- N ratios[matrix], k ascending: a rounded product, then a fused multiply-add for each k; ROWS rows per program."""
    t, matrix, row0, ordinal = tile_at(tiles, tl.program_id(0))
    _, n = factors_at(tensors, t, False)
    height, _ = extent_at(tensors, t, False)
    ratio = ratios + ordinal.to(tl.int64) * (RANK * RANK)
    rows = row0 + tl.arange(0, ROWS)
    ks = tl.arange(0, PADDED)
    row_mask = rows < height
    n_rows = n + (matrix.to(tl.int64) * height + rows) * RANK
    column = tl.load(n_rows, mask=row_mask, other=0.0)
    value = column[:, None] * tl.load(ratio + ks, mask=ks < RANK, other=0.0)[None, :]
    for k in range(1, RANK):
        column = tl.load(n_rows + k, mask=row_mask, other=0.0)
        value = fma(column[:, None], tl.load(ratio + k * RANK + ks, mask=ks < RANK, other=0.0)[None, :], value, EMULATE)
    # A column may have been read by other threads than those that write it.
    tl.debug_barrier()
    tl.store(n_rows[:, None] + ks[None, :], value, mask=row_mask[:, None] & (ks < RANK)[None, :])


@triton.jit(do_not_specialize=["tensor_id", "row_offset", "rows"])
def factor_rows(
    out, header, tensor_id, row_offset, rows, STREAM: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Writes (rows, RANK) fp32 of a factor."""
    k0, k1 = seed_words(header)
    direction, c3 = draw_words(header, 0, STREAM)
    row = tl.program_id(0).to(tl.int64) * ROWS
    first = (row_offset + row).to(tl.uint32)
    u = factor(first, tensor_id.to(tl.uint32), direction, c3, k0, k1, ROWS, RANK, PADDED, DP4A)
    index = row + tl.arange(0, ROWS)
    ks = tl.arange(0, PADDED)
    tl.store(out + index[:, None] * RANK + ks[None, :], u, mask=(index < rows)[:, None] & (ks < RANK)[None, :])


RESAMPLE_COLS = 64  # columns at a time: few enough that the fp32 sums of their products are exact


def resample_plan(rank: int, with_momentum: bool, target: Target) -> Plan:
    """The plan that makes the V of a window and, with momentum, the ratios for :func:`reproject`."""
    constants = {
        "RANK": rank,
        "PADDED": padded(rank),
        "REPROJECT": with_momentum,
        "COLS": RESAMPLE_COLS if padded(rank) <= 32 else RESAMPLE_COLS // 2,
        "DP4A": target.dp4a,
    }
    return Plan(resample, constants, num_warps=8 if padded(rank) > 32 else 4)  # four warps have too few registers for the fp64 sums


def reproject_plan(rank: int, target: Target) -> Plan:
    """The plan that re-projects the momentum to the new V."""
    return Plan(reproject, {"RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS, "EMULATE": target.emulate})


def factor_plan(stream: int, rank: int, target: Target) -> Plan:
    """The plan that makes one factor."""
    constants = {"STREAM": stream, "RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS, "DP4A": target.dp4a}
    return Plan(factor_rows, constants)


def launch_resample(table: TensorTable, seed: int, window: int, with_momentum: bool, launcher: Launcher) -> None:
    """Launches resample and, with momentum, reproject."""
    on_device, rank, device = device_table(table), table.rank, table.device
    matrices = on_device.matrices()
    header = on_device.headers.words(seed, [Draw(window)])
    ratios = torch.empty(len(matrices) * rank * rank if with_momentum else 1, dtype=torch.float32, device=device)
    plan = resample_plan(rank, with_momentum, target_of(device))
    launcher.launch(plan, len(matrices), device, matrices, on_device.tensors, header, ratios)
    if with_momentum:
        tiles = on_device.row_tiles(FACTOR_ROWS)
        launcher.launch(reproject_plan(rank, target_of(device)), len(tiles), device, tiles, on_device.tensors, ratios)


def launch_factor(out: Tensor, seed: int, draw: Draw, tensor_id: int, row_offset: int, stream: str, launcher: Launcher) -> None:
    """Launches factor_rows: fills ``out``, (rows, rank) fp32."""
    rows, rank = out.shape
    plan = factor_plan(STREAMS[stream], rank, target_of(out.device))
    header = Headers(out.device).words(seed, [draw])
    launcher.launch(plan, -(-rows // FACTOR_ROWS), out.device, out, header, as_int32(tensor_id), as_int32(row_offset), rows)
