"""The kernels of lowrank_points, Y[t] <- gain * Y[t] + (X[t] V) B^T + scale[t] * (X[t] V_r) U[direction[t]]^T, and their launches.

The contraction writes P = X F^T of the factor that is summed over: V, or, if the weight is transposed, B and then U of all
directions. Long rows are summed in parts, which are then added, each token's X U with them. The expansion multiplies P by the other
factors. Tokens of one program can be at several points, and matrix units multiply all tokens by the same factor, so each token has
zeros in place of P for the directions that it is not at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...calls import PointsCall
from .activations import PARTS, share
from .launcher import Launcher, PreparedLaunch
from .plans import ALL_REGISTERS, FACTOR_ROWS, SCALARS, Plan, Target, padded, registers_of, target_of
from .skinny import add_product
from .tilesizes import TileSize
from .weights import as_fp32, read_activations, read_weights, store_weights
from .work import SizeOf

RANKS = 32
"""The most ranks that a program handles at once. Further ranks are further programs of a contraction, and trips of a loop of an
expansion."""
_MOST_SHAPES = 1 << 12
"""The most shapes for which launches are kept."""
_NUMBERS = ("size", "ranks", "parts", "blocks", "width", "first", "own", "rank")  # none is compiled once more for one


@triton.jit
def factor_rows(f, ks, ranks, cols, extent):
    """Returns (ks, cols) fp32 of a factor that is given by ranks; zero outside of it."""
    mask = (ks < ranks)[:, None] & (cols < extent)[None, :]
    return tl.load(f + ks.to(tl.int64)[:, None] * extent + cols[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=_NUMBERS)
def points_contraction(
    x, f, sums, size, ranks, parts, blocks, width, first, inner, stride,
    PADDED: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr, TF32: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """sums[part, :, first:] <- X F^T over the columns of a part; (parts, tokens, width) fp32, ``width`` and ``first`` in blocks of
    PADDED ranks.

    A program does TOKENS of ``size`` tokens, PADDED of the ranks and one part, which is ``blocks`` of COLS columns.
    """
    program = tl.program_id(0)
    part = program % parts
    groups = (ranks + PADDED - 1) // PADDED
    group = program // parts % groups
    ks = tl.arange(0, PADDED)
    tokens = (program // parts // groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    token_mask = (tokens < size)[:, None]
    x_rows = x + tokens[:, None] * stride
    total = tl.zeros([TOKENS, PADDED], dtype=tl.float32)
    begin = part * blocks
    for block in range(begin, tl.minimum(begin + blocks, (inner + COLS - 1) // COLS)):
        cols = block * COLS + tl.arange(0, COLS)
        a = read_activations(x_rows + cols[None, :], token_mask & (cols < inner)[None, :])
        w = tl.trans(factor_rows(f, group * PADDED + ks, ranks, cols, inner))
        total = add_product(total, as_fp32(a, EMULATE), w, x.dtype.element_ty != tl.float32, False, TF32)
    row = ((part * size.to(tl.int64) + tokens) * width + first + group) * PADDED
    tl.store(sums + row[:, None] + ks[None, :], total, mask=token_mask)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=SCALARS)
def points_total(
    sums, p, directions, scales, size, parts, width, first, own, rank,
    SUMMED: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """p <- the sum of the parts of ``sums``, in order; (tokens, own) fp32, where ``width``, ``first`` and ``own`` count as above.

    With SUMMED each token's direction is added, which has ``rank`` columns of ``sums`` among those from ``first`` on. A program
    does TOKENS by PADDED.
    """
    program = tl.program_id(0)
    ks = program % own * PADDED + tl.arange(0, PADDED)
    tokens = (program // own).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    mask = (tokens < size)[:, None] & (ks >= 0)[None, :]
    rows = sums + (tokens * width * PADDED)[:, None]
    total = tl.zeros([TOKENS, PADDED], dtype=tl.float32)
    if SUMMED:
        scale = tl.load(scales + tokens, mask=tokens < size, other=0.0)
        direction = tl.load(directions + tokens, mask=tokens < size, other=0)
        moved = (scale != 0.0)[:, None] & (ks < rank)[None, :]
        mine = (first * PADDED + direction * rank)[:, None] + ks[None, :]
        along = tl.zeros([TOKENS, PADDED], dtype=tl.float32)
    for _ in range(parts):
        total += tl.load(rows + ks[None, :], mask=mask, other=0.0)
        if SUMMED:
            along += tl.load(rows + mine, mask=moved, other=0.0)
        rows += size.to(tl.int64) * width * PADDED
    if SUMMED:
        total += along * scale[:, None]
    tl.store(p + (tokens * own * PADDED)[:, None] + ks[None, :], total, mask=mask)


@triton.jit(do_not_specialize=_NUMBERS, do_not_specialize_on_alignment=SCALARS)
def points_expansion(
    y, p, f, u, directions, scales, gain, size, ranks, blocks, width, own, rank, outer, stride,
    POINTS: tl.constexpr, GAIN: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr,
    EIGHTS: tl.constexpr, TF32: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Y <- gain * Y + P F, and with POINTS + scale * P_r U of each token's direction. P is (tokens, width) fp32, counted as above.

    U has ``rank`` rows for each direction and ``own`` in all. A program updates COLS columns of ``blocks`` times TOKENS tokens.
    """
    program = tl.program_id(0)
    across = (outer + COLS - 1) // COLS
    down = (size + TOKENS - 1) // TOKENS
    cols = program % across * COLS + tl.arange(0, COLS)
    begin = program // across * blocks
    for block in range(begin, tl.minimum(begin + blocks, down)):
        tokens = (block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
        token_mask = (tokens < size)[:, None]
        mask = token_mask & (cols < outer)[None, :]
        p_rows = p + (tokens * width * PADDED)[:, None]
        total = tl.zeros([TOKENS, COLS], dtype=tl.float32)
        for group in range(0, (ranks + PADDED - 1) // PADDED):
            ks = group * PADDED + tl.arange(0, PADDED)
            part = tl.load(p_rows + ks[None, :], mask=token_mask & (ks < ranks)[None, :], other=0.0)
            total = add_product(total, part, factor_rows(f, ks, ranks, cols, outer), False, False, TF32)
        if POINTS:
            scale = tl.load(scales + tokens, mask=tokens < size, other=0.0)
            direction = tl.load(directions + tokens, mask=tokens < size, other=0).to(tl.int32)
            moved = (scale != 0.0)[:, None]
            for group in range(0, (own + PADDED - 1) // PADDED):
                ks = group * PADDED + tl.arange(0, PADDED)
                mine = moved & (ks < own)[None, :] & ((ks // rank)[None, :] == direction[:, None])
                part = tl.load(p_rows + (ks % rank)[None, :], mask=mine, other=0.0) * scale[:, None]
                total = add_product(total, part, factor_rows(u, ks, own, cols, outer), False, False, TF32)
        y_rows = y + tokens[:, None] * stride
        result = as_fp32(read_weights(y_rows + cols[None, :], mask), EMULATE)
        if GAIN:
            result = result * tl.load(gain)
        result = result + total
        if EIGHTS:  # see lowrank.update_block
            pointer = y_rows[:, :, None] + cols.reshape(COLS // 8, 8)[None, :, :]
            store_weights(pointer, result.reshape(TOKENS, COLS // 8, 8), mask.reshape(TOKENS, COLS // 8, 8), EMULATE)
        else:
            store_weights(y_rows + cols[None, :], result, mask, EMULATE)


def points_contraction_plan(ranks: int, size: TileSize, target: Target) -> Plan:
    """The plan of the product of activations with a factor of ``ranks`` ranks."""
    constants = {"PADDED": _padded(ranks), "TOKENS": size.rows, "COLS": size.cols, "TF32": target.tf32, "EMULATE": target.emulate}
    return Plan(points_contraction, constants, size.num_warps, registers_of(size, target, ALL_REGISTERS))


def points_total_plan(ranks: int, summed: bool) -> Plan:
    """The plan that adds the parts of contractions, and with ``summed`` X U of each token's direction."""
    return Plan(points_total, {"SUMMED": summed, "PADDED": _padded(ranks), "TOKENS": FACTOR_ROWS})


def points_expansion_plan(dtype: torch.dtype, ranks: int, points: bool, gain: bool, size: TileSize, target: Target) -> Plan:
    """The plan that multiplies P by a factor of ``ranks`` ranks, and with ``points`` by U too, and adds to Y."""
    constants = {
        "POINTS": points,
        "GAIN": gain,
        "PADDED": _padded(ranks),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "EIGHTS": target.eights and dtype.itemsize == 2,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(points_expansion, constants, size.num_warps, registers_of(size, target, ALL_REGISTERS))


def _padded(ranks: int) -> int:
    return padded(min(ranks, RANKS))


class Points:
    """Launches lowrank_points. What it prepared for a shape is used for every later call of that shape."""

    def __init__(self, launcher: Launcher, size_of: SizeOf) -> None:
        self._launcher, self._size_of = launcher, size_of
        self._known: dict[Hashable, _Launches] = {}

    def launch(self, call: PointsCall) -> None:
        """Launches a contraction, one more for U if it is summed over, the sum of parts if there are any, and an expansion."""
        key = _key(call)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST_SHAPES:
                self._known.clear()
            known = self._known[key] = self._prepare(call)
        inner, outer = (call.b, call.v) if call.transposed else (call.v, call.b)
        p = sums = torch.empty(known.sums, dtype=torch.float32, device=call.x.device)
        known.contraction(call.x, inner, sums)
        if known.own is not None:
            known.own(call.x, call.u, sums)
        if known.total is not None:
            p = torch.empty(known.p, dtype=torch.float32, device=call.x.device)
            known.total(sums, p, call.directions, call.scales)
        u, gain = (call.scales if t is None else t for t in (call.u, call.gain))  # any pointer, which is not read
        known.expansion(call.y, p, outer, u, call.directions, call.scales, gain)

    def _prepare(self, call: PointsCall) -> _Launches:
        y, x, u, ranks = call.y, call.x, call.u, len(call.v)
        tokens, inner, outer, most = len(y), x.shape[1], y.shape[1], _padded(ranks)
        count, rank = (0, 0) if u is None else u.shape[:2]
        own, summed, target = count * rank, call.transposed and u is not None, target_of(y.device)
        width = wide = -(-ranks // most)  # of P, and of the sums, in blocks
        if summed:
            wide += -(-own // most)

        def prepared(plan: Plan, programs: int, *last: int) -> PreparedLaunch:
            return PreparedLaunch(self._launcher, plan, programs, y.device, last)

        size = self._size("contraction", call)
        tiles, across = -(-tokens // size.rows), -(-inner // size.cols)
        blocks = max(share(across, size.blocks, tiles), -(-across // PARTS))
        parts = max(1, -(-across // blocks))

        def contraction(count: int, first: int) -> PreparedLaunch:
            last = (tokens, count, parts, blocks, wide, first, inner, x.stride(0))
            return prepared(points_contraction_plan(ranks, size, target), tiles * parts * -(-count // most), *last)

        first, of_own = contraction(ranks, 0), contraction(own, width) if summed else None
        total = None
        if parts > 1 or summed:
            programs = -(-tokens // FACTOR_ROWS) * width
            total = prepared(points_total_plan(ranks, summed), programs, tokens, parts, wide, width, width, rank)
        size = self._size("expansion", call)
        down, across = -(-tokens // size.rows), -(-outer // size.cols)
        blocks = share(down, size.blocks, across)
        plan = points_expansion_plan(y.dtype, ranks, u is not None and not summed, call.gain is not None, size, target)
        last = (tokens, ranks, blocks, width, own, rank, outer, y.stride(0))
        expansion = prepared(plan, across * -(-down // blocks), *last)
        return _Launches(first, of_own, total, expansion, (parts, tokens, wide * most), (tokens, width * most))

    def _size(self, kernel: str, call: PointsCall) -> TileSize:
        """The tile size with as few rows as the tokens need, but at least 16, the least that tensor cores take."""
        size, tokens = self._size_of(kernel, call.y.device, True, min(len(call.v), RANKS), False), len(call.y)
        return dataclasses.replace(size, rows=min(size.rows, max(16, 1 << max(0, tokens - 1).bit_length())))


@dataclasses.dataclass(slots=True)
class _Launches:
    """The launches of a call, and the shapes of the sums and of P between them."""

    contraction: PreparedLaunch
    own: PreparedLaunch | None
    total: PreparedLaunch | None
    expansion: PreparedLaunch
    sums: tuple[int, ...]
    p: tuple[int, ...]


def _key(call: PointsCall) -> Hashable:
    """All that the launches of a call depend on, besides the addresses of its tensors."""
    y, x, u = call.y, call.x, call.u
    tensors: tuple[Tensor | None, ...] = (y, x, call.v, call.b, u, call.directions, call.scales, call.gain)
    odd = tuple(t is not None and bool(t.data_ptr() & 15) for t in tensors)  # Triton compiles another kernel then
    return (
        *(y.shape, y.stride(0), y.dtype, y.get_device(), x.shape, x.stride(0), x.dtype),
        *(call.v.shape, None if u is None else u.shape, call.transposed, call.gain is None, odd),
    )
