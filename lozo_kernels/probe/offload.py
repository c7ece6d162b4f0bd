"""Weights that accelerate keeps on the CPU or on disk, brought to a device to be merged into and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ..offloaded import Home
from ..sharding import gather
from .members import Holder, Member


def execution_device(holders: list[Holder]) -> torch.device:
    """Where the modules that hold an offloaded weight run."""
    return next(holder.home.execution_device for holder in holders if holder.home is not None)


def load_weight(member: Member, device: torch.device) -> Tensor:
    """An offloaded or sharded weight of its parameter's shape and dtype, contiguous; in memory of the device it is not copied.

    A sharded one is gathered, which every process has to take part in.
    """
    if member.slot.out_of_reach == "sharded":
        return gather(member.slot.parameter).detach().to(device).contiguous()
    weight = _resident(member)
    if weight is None:
        weight = _homes(member)[0].load()
    return weight.detach().to(device, member.slot.parameter.dtype).contiguous()


@contextlib.contextmanager
def offloaded_weight(member: Member, device: torch.device) -> Iterator[Tensor]:
    """An offloaded weight as (batch, rows, cols) on a device, written back to where it is kept, tied ones to every place once.

    :meth:`lozo_kernels.offloaded.Home.store` says what becomes of files. If the body raises, what is on disk stays as it was.
    """
    weight = load_weight(member, device)
    yield member.slot.matrices(weight)
    resident = _resident(member)
    if resident is not None and resident.data_ptr() != weight.data_ptr():
        resident.detach().copy_(weight)
    for home in _homes(member):
        home.store(weight)


def _homes(member: Member) -> list[Home]:
    """The places where the weight is kept, each once."""
    return list({holder.home.place: holder.home for holder in member.holders if holder.home is not None}.values())


def _resident(member: Member) -> Tensor | None:
    """The parameter of a module that always has it, where it is tied to one that does not."""
    held = (holder.module._parameters[holder.attribute] for holder in member.holders if holder.home is None)
    return next(held, None)
