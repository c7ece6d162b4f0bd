"""What a journal's header says of a model and of the libraries at hand."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ..kernels.registry import choose_backend
from ..model.handle import Handle
from ..optim.optimizer import ZerothOrderOptimizer
from .fingerprint import weight_fingerprints
from .format import Parameter


def describe_parameters(handle: Handle, *, fingerprints: bool = True) -> tuple[Parameter, ...]:
    """The trained parameters, with fingerprints of their weights as they are now or with none."""
    found = weight_fingerprints(handle) if fingerprints else [""] * len(handle.names)
    rows = []
    for slot, own in zip(handle._slots, found, strict=True):
        quantised = slot.out_of_reach == "quantised"  # the storage may be packed
        shape = slot.extent[1:] if quantised else tuple(slot.parameter.shape)
        dtype = "quantised" if quantised else str(slot.parameter.dtype).removeprefix("torch.")
        rows.append(Parameter(slot.name, tuple(shape), dtype, slot.kind, slot.tensor_id, own))
    return tuple(rows)


def describe_groups(optimizer: ZerothOrderOptimizer) -> tuple[tuple[int, ...], ...]:
    """Positions of the parameters of each group, in the order of ``Handle.names``."""
    position = {name: i for i, name in enumerate(optimizer.handle.names)}
    return tuple(tuple(position[name] for name in names) for names in optimizer._trained_names())


def made_with(handle: Handle) -> dict[str, Any]:
    """Versions, and the backends that serve the handle's devices."""
    backends = {choose_backend(device, handle.config.backend).backend.name for device in map(handle._device, handle._slots)}
    return {"torch": torch.__version__, "python": platform.python_version(), "backends": sorted(backends)}
