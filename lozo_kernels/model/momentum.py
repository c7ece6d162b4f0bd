"""Momentum of sharded parameters, as every process sees it: in one piece, or as a tensor that is sharded like its parameter."""

from __future__ import annotations

import math

from torch import Tensor

from .parameters import Slot
from .sharding import block_of, gather, is_sharded, sharded_like


def spread(slot: Slot, piece: Tensor) -> Tensor:
    """What this process keeps, as a DTensor of the whole momentum; where the parameter is not sharded, as it is.

    Args:
        piece: as :attr:`Handle.momentum` has it.
    """
    p = slot.parameter
    return sharded_like(piece, p, _axes(slot), _whole_shape(slot, piece.shape[-1])) if is_sharded(p) else piece


def piece_of(slot: Slot, saved: Tensor, like: Tensor, in_pieces: bool) -> Tensor:
    """The inverse, from momentum that was saved in one piece or spread over any number of processes.

    Args:
        saved: a DTensor that is not sharded like the parameter is gathered, which every process has to take part in.
        like: what this process keeps.
        in_pieces: that is the part of its shard.

    Raises:
        ValueError: as :func:`check_saved`.
    """
    shape = check_saved(slot, saved, like, in_pieces)
    cut = in_pieces and slot.out_of_reach == "sharded"
    if cut and is_sharded(saved):
        mine = spread(slot, like)
        if (saved.device_mesh, saved.placements, saved.shape) == (mine.device_mesh, mine.placements, mine.shape):  # type: ignore[attr-defined]
            return saved.to_local()  # type: ignore[attr-defined,no-any-return]
    whole = gather(saved).reshape(shape)
    if cut:
        block = block_of(slot.name, slot.parameter)
        for dimension, axis in _axes(slot).items():
            if dimension < len(block.offsets):
                whole = whole.narrow(axis, block.offsets[dimension], block.local.shape[dimension])
    return whole.reshape(like.shape)


def check_saved(slot: Slot, saved: Tensor, like: Tensor, in_pieces: bool) -> tuple[int, ...]:
    """The shape of the whole momentum. Arguments as :func:`piece_of`; of a dense parameter only the size has to be right.

    Raises:
        ValueError: saved momentum is of another.
    """
    cut = in_pieces and slot.out_of_reach == "sharded"
    shape = _whole_shape(slot, like.shape[-1]) if cut else tuple(like.shape)
    fits = tuple(saved.shape) == shape if slot.kind == "lowrank" else saved.numel() == math.prod(shape)
    if not fits:
        raise ValueError(f"saved momentum of {slot.name!r} is {tuple(saved.shape)}, needed is {shape}")
    return shape


def _axes(slot: Slot) -> dict[int, int]:
    """Which dimension of the momentum each dimension of the parameter cuts; others leave it whole in every process."""
    if slot.kind == "lowrank":
        return {0: 0 if slot.layout == "experts" else 1}
    dimensions = slot.parameter.dim()
    return {0: 2} if dimensions < 2 else {0: 1, 1: 2} if dimensions == 2 else {0: 1}


def _whole_shape(slot: Slot, last: int) -> tuple[int, int, int]:
    """(batch, rows, rank), or of a dense parameter (1, rows, columns) as its shards are seen."""
    p = slot.parameter
    if slot.kind == "lowrank":
        batch, rows, _ = slot.extent
        return batch, rows, last
    return (1, 1, p.numel()) if p.dim() < 2 else (1, p.shape[0], math.prod(p.shape[1:]))
