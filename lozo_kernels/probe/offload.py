"""Weights that accelerate keeps on the CPU or on disk and brings in while their module runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .members import Member


def execution_device(module: nn.Module | None) -> torch.device:
    """Where an offloaded module runs."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return torch.device("cpu")


@contextlib.contextmanager
def offloaded_weight(member: Member, device: torch.device) -> Iterator[Tensor]:
    """An offloaded weight as (batch, rows, cols) on a device, written back to where it is kept."""
    raise NotImplementedError
    yield
