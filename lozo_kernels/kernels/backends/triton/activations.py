"""Launching the products of activations with factors (skinny.py): how tokens and columns are divided, and the scratch between."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...calls import LayerCall
from .tilesizes import TileSize

if TYPE_CHECKING:
    from .launcher import Launcher
    from .plans import Target

_PROGRAMS = 512
"""That fill a large device a few times over. Fewer tiles than these are divided further."""
_PARTS = 16
"""Of a long row at most: whoever reads them adds them one after the other."""


@dataclasses.dataclass(frozen=True)
class Activations:
    """What one call is launched with.

    Attributes:
        size_of: the tile size of a kernel for a rank.
    """

    launcher: Launcher
    target: Target
    size_of: Callable[[str, int], TileSize]

    def linear(self, call: LayerCall) -> None:
        """The op lowrank_linear."""
        from . import plans

        rank = len(call.v)
        inner = call.x.shape[1]
        size = _fitted(self.size_of("contraction", rank), call)
        across = -(-inner // size.cols)
        tiles = _tiles(call, size)
        blocks = max(_share(across, size.blocks, tiles), -(-across // _PARTS))
        parts = max(1, -(-across // blocks))
        sums = torch.empty(parts, len(call.y), plans.padded(rank), dtype=torch.float32, device=call.y.device)
        plan = plans.contraction_plan(rank, call.transposed, size, self.target)
        arguments = (call.x, call.v, call.b, call.draws, call.scales, sums, *_place(call), *_tokens(call))
        self.launcher.launch(plan, tiles * parts, call.y.device, *arguments, parts, blocks, inner, call.x.stride(0))
        self._expand(call, sums)

    def embedding(self, call: LayerCall) -> None:
        """The op lowrank_embedding."""
        from . import plans

        rank, (tokens, groups) = len(call.v), _tokens(call)
        sums = torch.empty(1, len(call.y), plans.padded(rank), dtype=torch.float32, device=call.y.device)
        plan = plans.lookup_plan(rank, plans.FACTOR_ROWS, self.target)
        arguments = (call.x, call.b, call.draws, call.scales, sums, *_place(call), tokens, len(call.b))
        self.launcher.launch(plan, groups * -(-tokens // plans.FACTOR_ROWS), call.y.device, *arguments)
        self._expand(dataclasses.replace(call, transposed=True), sums)

    def _expand(self, call: LayerCall, sums: Tensor) -> None:
        from . import plans

        y, rank = call.y, len(call.v)
        size = _fitted(self.size_of("expansion", rank), call)
        tokens, groups = _tokens(call)
        down, across = -(-tokens // size.rows), -(-y.shape[1] // size.cols)
        blocks = _share(down, size.blocks, groups * across)
        factor, parts, unused = not call.transposed, len(sums), call.scales
        gain, shift = (unused if t is None else t for t in (call.gain, call.shift))
        kind = (parts > 1, call.gain is not None, call.shift is not None)
        plan = plans.expansion_plan(y.dtype, rank, factor, *kind, size, self.target)
        arguments = (y, sums, call.v, call.b, call.draws, call.scales, gain, shift, *_place(call), tokens, groups)
        programs = groups * across * -(-down // blocks)
        self.launcher.launch(plan, programs, y.device, *arguments, parts, blocks, y.shape[1], y.stride(0))


def _fitted(size: TileSize, call: LayerCall) -> TileSize:
    """With fewer tokens a tile where an evaluation has fewer; tensor cores take no less than 16."""
    tokens, _ = _tokens(call)
    return dataclasses.replace(size, rows=min(size.rows, max(16, 1 << (tokens - 1).bit_length())))


def _tiles(call: LayerCall, size: TileSize) -> int:
    tokens, groups = _tokens(call)
    return groups * -(-tokens // size.rows)


def _share(blocks: int, most: int, others: int) -> int:
    """How many of so many blocks one program takes, where there are ``others`` such rows of blocks: a power of two."""
    share = 1
    while share < most and others * -(-blocks // (2 * share)) >= _PROGRAMS:
        share *= 2
    return share


def _tokens(call: LayerCall) -> tuple[int, int]:
    """Tokens of an evaluation, and evaluations."""
    groups = len(call.draws)
    return len(call.y) // groups, groups


def _place(call: LayerCall) -> tuple[int, int, int, int]:
    """Seed, tensor id and row offset as kernels take them."""
    words = (call.seed & 0xFFFFFFFF, call.seed >> 32, call.tensor_id, call.row_offset)
    return tuple(w - (1 << 32) if w >= 1 << 31 else w for w in words)  # type: ignore[return-value]
