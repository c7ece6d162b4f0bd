"""Momentum of sharded parameters, as every process sees it: in one piece, or as a tensor that is sharded like its parameter."""

from __future__ import annotations

import math

from torch import Tensor

from .parameters import Parameter
from .sharding import block_of, gather, is_sharded, sharded_like


def spread(p: Parameter, piece: Tensor) -> Tensor:
    """What this process keeps, as a DTensor of the whole momentum; where the parameter is not sharded, as it is.

    Args:
        piece: as :attr:`Handle.momentum` has it.
    """
    t = p.tensor
    return sharded_like(piece, t, _axes(p), _whole_shape(p, piece.shape[-1])) if is_sharded(t) else piece


def piece_of(p: Parameter, saved: Tensor, like: Tensor, in_pieces: bool) -> Tensor:
    """The inverse, from momentum that was saved in one piece or spread over any number of processes.

    Args:
        saved: a DTensor that is not sharded like the parameter is gathered, which every process has to take part in.
        like: what this process keeps.
        in_pieces: that is the part of its shard.

    Raises:
        ValueError: as :func:`check_saved`.
    """
    shape = check_saved(p, saved, like, in_pieces)
    cut = in_pieces and p.storage.sharded
    if cut and is_sharded(saved):
        mine = spread(p, like)
        if (saved.device_mesh, saved.placements, saved.shape) == (mine.device_mesh, mine.placements, mine.shape):  # type: ignore[attr-defined]
            return saved.to_local()  # type: ignore[attr-defined,no-any-return]
    whole = gather(saved).reshape(shape)
    if cut:
        local, offsets = block_of(p.name, p.tensor)
        for dimension, axis in _axes(p).items():
            if dimension < len(offsets):
                whole = whole.narrow(axis, offsets[dimension], local.shape[dimension])
    return whole.reshape(like.shape)


def check_saved(p: Parameter, saved: Tensor, like: Tensor, in_pieces: bool) -> tuple[int, ...]:
    """The shape of the whole momentum. Arguments as :func:`piece_of`; of a dense parameter only the size has to be right.

    Raises:
        ValueError: saved momentum is of another.
    """
    cut = in_pieces and p.storage.sharded
    shape = _whole_shape(p, like.shape[-1]) if cut else tuple(like.shape)
    fits = tuple(saved.shape) == shape if p.low_rank else saved.numel() == math.prod(shape)
    if not fits:
        raise ValueError(f"saved momentum of {p.name!r} is {tuple(saved.shape)}, needed is {shape}")
    return shape


def _axes(p: Parameter) -> dict[int, int]:
    """Which dimension of the momentum each dimension of the parameter cuts; others leave it whole in every process."""
    if p.low_rank:
        return {0: 0 if p.layout.form == "experts" else 1}
    dimensions = p.tensor.dim()
    return {0: 2} if dimensions < 2 else {0: 1, 1: 2} if dimensions == 2 else {0: 1}


def _whole_shape(p: Parameter, last: int) -> tuple[int, int, int]:
    """(batch, rows, rank), or of a dense parameter (1, rows, columns) as its shards are seen."""
    if p.low_rank:
        batch, rows, _ = p.extent
        return batch, rows, last
    shape = p.tensor.shape
    return (1, 1, shape.numel()) if len(shape) < 2 else (1, shape[0], math.prod(shape[1:]))
