"""Launches of the products of activations with factors (skinny.py): how tokens and columns are divided, and the scratch memory."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable

import torch
from torch import Tensor

from ...calls import LayerCall
from .launcher import Launcher, PreparedLaunch
from .plans import ALL_REGISTERS, FACTOR_ROWS, Plan, Target, as_int32, padded, registers_of, target_of
from .skinny import contraction, expansion, lookup
from .tilesizes import TileSize
from .work import SizeOf

_PROGRAMS = 512
"""Programs that fill a large device a few times over. Work with fewer tiles is divided further."""
PARTS = 16
"""The most parts that a long row is divided into, because the expansion adds the parts one after the other."""
_MOST_SHAPES = 1 << 14
"""The most shapes for which launches are kept, and the most layers whose place in the noise is."""


def contraction_plan(rank: int, factor: bool, size: TileSize, target: Target) -> Plan:
    """The plan of the product of activations with V or, with ``factor``, with B + scale * U."""
    constants = {
        "FACTOR": factor,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(contraction, constants, size.num_warps, registers_of(size, target, ALL_REGISTERS))


def lookup_plan(rank: int, tokens: int, target: Target) -> Plan:
    """The plan that looks up rows of B + scale * U, ``tokens`` per program."""
    return Plan(lookup, {"RANK": rank, "PADDED": padded(rank), "TOKENS": tokens, "DP4A": target.dp4a})


def expansion_plan(
    dtype: torch.dtype, rank: int, factor: bool, parts: int, gain: bool, shift: bool, size: TileSize, target: Target
) -> Plan:
    """The plan that multiplies sums of a contraction or look-up by V, or by B + scale * U, and adds to Y.

    Args:
        parts: the sums are in that many parts, or in fewer.
    """
    constants = {
        "FACTOR": factor,
        "PARTS": parts,
        "GAIN": gain,
        "SHIFT": shift,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "EIGHTS": target.eights and dtype.itemsize == 2,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(expansion, constants, size.num_warps, registers_of(size, target))


class Activations:
    """Launches the ops on activations. What it prepared for a shape is used for every later call of that shape."""

    def __init__(self, launcher: Launcher, size_of: SizeOf) -> None:
        self._launcher, self._size_of = launcher, size_of
        self._known: dict[Hashable, _Launches] = {}

    def linear(self, call: LayerCall) -> None:
        """Launches lowrank_linear: a contraction, and the expansion of its sums."""
        key = _key(call)
        known = self._known.get(key)
        if known is None:
            known = self._keep(key, *self._contraction(call))
        x, v, b, draws, scales = call.x, call.v, call.b, call.draws, call.scales
        place = _place(call.seed, call.tensor_id, call.row_offset)
        sums = torch.empty(known.sums, dtype=torch.float32, device=x.device)
        known.first(x, v, b, draws, scales, sums, *place)
        known.expand(call, sums, place)

    def embedding(self, call: LayerCall) -> None:
        """Launches lowrank_embedding: a look-up, and the expansion of its rows."""
        key = (len(call.b), _key(call))
        known = self._known.get(key)
        if known is None:
            known = self._keep(key, *self._lookup(call))
        x, b, draws, scales = call.x, call.b, call.draws, call.scales
        place = _place(call.seed, call.tensor_id, call.row_offset)
        sums = torch.empty(known.sums, dtype=torch.float32, device=x.device)
        known.first(x, b, draws, scales, sums, *place)
        known.expand(call, sums, place)

    def _keep(self, key: Hashable, first: PreparedLaunch, expansion: PreparedLaunch, sums: tuple[int, ...]) -> _Launches:
        if len(self._known) >= _MOST_SHAPES:
            self._known.clear()
        known = self._known[key] = _Launches(first, expansion, sums)
        return known

    def _contraction(self, call: LayerCall) -> tuple[PreparedLaunch, PreparedLaunch, tuple[int, ...]]:
        y, rank, inner = call.y, len(call.v), call.x.shape[1]
        size = _fitted(self._size_of("contraction", y.device, True, rank, False), call)
        across = -(-inner // size.cols)
        tiles = _tiles(call, size)
        blocks = max(share(across, size.blocks, tiles), -(-across // PARTS))
        parts = max(1, -(-across // blocks))
        plan = contraction_plan(rank, call.transposed, size, target_of(y.device))
        last = (*_tokens(call), parts, blocks, inner, call.x.stride(0))
        first = PreparedLaunch(self._launcher, plan, tiles * parts, y.device, last)
        return first, self._expansion(call, parts, not call.transposed), (parts, len(y), padded(rank))

    def _lookup(self, call: LayerCall) -> tuple[PreparedLaunch, PreparedLaunch, tuple[int, ...]]:
        y, rank, (tokens, groups) = call.y, len(call.v), _tokens(call)
        plan = lookup_plan(rank, FACTOR_ROWS, target_of(y.device))
        programs = groups * -(-tokens // FACTOR_ROWS)
        first = PreparedLaunch(self._launcher, plan, programs, y.device, (tokens, len(call.b)))
        return first, self._expansion(call, 1, False), (1, len(y), padded(rank))

    def _expansion(self, call: LayerCall, parts: int, factor: bool) -> PreparedLaunch:
        """The expansion by V or, with ``factor``, by B + scale * U."""
        y, rank = call.y, len(call.v)
        size = _fitted(self._size_of("expansion", y.device, True, rank, False), call)
        tokens, groups = _tokens(call)
        down, across = -(-tokens // size.rows), -(-y.shape[1] // size.cols)
        blocks = share(down, size.blocks, groups * across)
        kind = (1 << (parts - 1).bit_length(), call.gain is not None, call.shift is not None)
        plan = expansion_plan(y.dtype, rank, factor, *kind, size, target_of(y.device))
        last = (tokens, groups, parts, blocks, y.shape[1], y.stride(0))
        return PreparedLaunch(self._launcher, plan, groups * across * -(-down // blocks), y.device, last)


@dataclasses.dataclass(slots=True)
class _Launches:
    """The two launches of a call, and the shape of the sums between them."""

    first: PreparedLaunch
    expansion: PreparedLaunch
    sums: tuple[int, ...]

    def expand(self, call: LayerCall, sums: Tensor, place: tuple[int, ...]) -> None:
        scales, gain, shift = call.scales, call.gain, call.shift
        self.expansion(
            call.y,
            sums,
            call.v,
            call.b,
            call.draws,
            scales,
            scales if gain is None else gain,  # any pointer, which is not read
            scales if shift is None else shift,
            *place,
        )


def _key(call: LayerCall) -> Hashable:
    """All that the launches of a call depend on, besides the addresses of its tensors and their place in the noise."""
    y, x, gain, shift = call.y, call.x, call.gain, call.shift
    addresses = [y.data_ptr(), x.data_ptr(), call.v.data_ptr(), call.b.data_ptr(), call.draws.data_ptr(), call.scales.data_ptr()]
    if gain is not None:
        addresses.append(gain.data_ptr())
    if shift is not None:
        addresses.append(shift.data_ptr())
    odd: tuple[int, ...] = ()
    for address in addresses:
        if address & 15:  # Triton compiles another kernel then
            odd = tuple(address & 15 for address in addresses)
            break
    return (
        *(y.shape, y.stride(0), y.dtype, y.get_device(), x.shape, x.stride(0), x.dtype),
        *(call.v.shape, call.draws.shape, call.transposed, gain is None, shift is None, odd),
    )


def _fitted(size: TileSize, call: LayerCall) -> TileSize:
    """The tile size with as few rows as the tokens of one evaluation need, but at least 16, the least that tensor cores take."""
    tokens, _ = _tokens(call)
    return dataclasses.replace(size, rows=min(size.rows, max(16, 1 << (tokens - 1).bit_length())))


def _tiles(call: LayerCall, size: TileSize) -> int:
    tokens, groups = _tokens(call)
    return groups * -(-tokens // size.rows)


def share(blocks: int, most: int, others: int) -> int:
    """How many of ``blocks`` blocks one program takes: a power of two up to ``most``. There are ``others`` such rows of blocks."""
    share = 1
    while share < most and others * -(-blocks // (2 * share)) >= _PROGRAMS:
        share *= 2
    return share


def _tokens(call: LayerCall) -> tuple[int, int]:
    """The tokens of one evaluation, and the number of evaluations."""
    groups = len(call.draws)
    return len(call.y) // groups, groups


@functools.lru_cache(_MOST_SHAPES)
def _place(seed: int, tensor_id: int, row_offset: int) -> tuple[int, ...]:
    """Seed (two words), tensor id and row offset."""
    return tuple(map(as_int32, (seed & 0xFFFFFFFF, seed >> 32, tensor_id, row_offset)))
