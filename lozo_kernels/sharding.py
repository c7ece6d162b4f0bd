"""Sharded weights, DTensors of the global shape: what this process has of one, and bringing shards back.

FSDP (``torch.distributed.fsdp.fully_shard``) leaves rows with each process between forwards, and makes the parameter an ordinary
tensor, the whole weight, while its module runs. Tensor parallelism keeps rows or columns all the time. ``torch.distributed`` is
not imported here: where nobody did, nothing is sharded.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Shard:
    """Rows of a weight (elements of a vector) from ``offset`` on, in storage of this process; there may be none."""

    local: Tensor
    offset: int


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of a weight in storage of this process: ``offsets`` has where it begins in each dimension. It may be empty."""

    local: Tensor
    offsets: tuple[int, ...]


def is_sharded(p: Tensor) -> bool:
    """Whether it is a DTensor."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(p, kind)


def reshard(model: nn.Module) -> None:
    """Leaves only shards of the weights that FSDP keeps whole after a forward, as it does with those of the root."""
    for module in _managed(model):
        module.reshard()


def check_shards(model: nn.Module, name: str, p: Any) -> None:
    """Raises TypeError, with the way out, for a DTensor that is not made of rows by FSDP."""
    if not _managed(model):
        raise TypeError(f"parameter {name!r} is a DTensor that fully_shard() did not make: exclude it")
    *others, last = p.placements
    if not (last.is_shard(0) and all(other.is_replicate() for other in others)):  # tensor parallel ones come last
        raise TypeError(
            f"parameter {name!r} is sharded as {tuple(p.placements)}; rows alone can be (Shard(0), last of the mesh): exclude it"
        )


def check_block(name: str, p: Any, dimensions: int) -> None:
    """Raises TypeError, with the way out, for a DTensor that is not cut along its first ``dimensions`` dimensions."""
    for placement in p.placements:
        strided = "Strided" in type(placement).__name__  # FSDP over tensor parallelism: rows that do not lie together
        if not placement.is_replicate() and (strided or not placement.is_shard() or placement.dim >= dimensions):
            raise TypeError(
                f"parameter {name!r} of shape {tuple(p.shape)} is sharded as {tuple(p.placements)}; moved in place can be "
                f"contiguous shards of dimension {' or '.join(map(str, range(dimensions)))}: exclude it"
            )


def block_of(name: str, p: Any) -> Block:
    """What this process has of a weight that :func:`check_block` let pass: a view, so that writing it changes the weight.

    Raises:
        RuntimeError: it is whole now, or has another shape here than its placements say.
    """
    if not is_sharded(p):
        raise RuntimeError(f"parameter {name!r} is not in shards now: its module is running, or it is not sharded any more")
    sizes, offsets = list(p.shape), [0] * p.dim()
    for axis, placement in enumerate(p.placements):
        if placement.is_shard():
            d, whole = placement.dim, sizes[placement.dim]
            chunk = -(-whole // p.device_mesh.size(axis))
            first = min(whole, chunk * p.device_mesh.get_coordinate()[axis])
            offsets[d] += first
            sizes[d] = min(chunk, whole - first)
    local = p.detach().to_local()
    if list(local.shape) != sizes:
        raise RuntimeError(f"parameter {name!r} has {tuple(local.shape)} here where {tuple(sizes)} was expected")
    return Block(local, tuple(offsets))


def running_device(p: Any) -> torch.device:
    """Where the whole weight is while its module runs: the shards may be kept on the CPU."""
    if not is_sharded(p) or p.device.type == p.device_mesh.device_type:
        return p.device
    kind = p.device_mesh.device_type
    return torch.device(kind, torch.get_device_module(kind).current_device())


def shard_of(name: str, p: Any) -> Shard:
    """What this process has of a weight: a view, so that writing it changes the weight.

    Raises:
        RuntimeError: it is whole now, or has another number of rows than FSDP gives this process.
    """
    if not is_sharded(p):
        raise RuntimeError(f"parameter {name!r} is not in shards now: its module is running, or it is not FSDP's any more")
    local, rows, mesh = p.detach().to_local(), p.shape[0], p.device_mesh
    chunk = -(-rows // mesh.size(mesh.ndim - 1))
    offset = min(rows, chunk * mesh.get_coordinate()[-1])
    expected = min(chunk, rows - offset)
    if len(local) != expected:
        raise RuntimeError(f"parameter {name!r} has {len(local)} rows here where {expected} of {rows} were expected")
    return Shard(local, offset)


def gather(p: Any) -> Tensor:
    """The weight in one piece; while it is in shards a collective, which every process has to call."""
    return p.full_tensor() if is_sharded(p) else p  # type: ignore[no-any-return]


def _managed(model: nn.Module) -> list[Any]:
    """The modules that ``fully_shard()`` was applied to."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]
