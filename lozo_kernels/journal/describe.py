"""What a journal's header says of a model and of the libraries at hand."""

from __future__ import annotations

import platform
from typing import Any

import torch

from ..kernels.registry import choose_backend
from ..model.handle import Handle
from ..optim.groups import trained_names
from ..optim.optimizer import ZerothOrderOptimizer
from .fingerprint import weight_fingerprints
from .format import RecordedParameter


def describe_parameters(handle: Handle, *, fingerprints: bool = True) -> tuple[RecordedParameter, ...]:
    """The trained parameters, with fingerprints of their weights as they are now or with none."""
    found = weight_fingerprints(handle) if fingerprints else [""] * len(handle.names)
    return tuple(
        RecordedParameter(p.name, tuple(p.storage.shape), p.storage.dtype, p.kind, p.tensor_id, own)
        for p, own in zip(handle.trained, found, strict=True)
    )


def describe_groups(optimizer: ZerothOrderOptimizer) -> tuple[tuple[int, ...], ...]:
    """Positions of the parameters of each group, in the order of ``Handle.names``."""
    position = {name: i for i, name in enumerate(optimizer.handle.names)}
    return tuple(tuple(position[name] for name in names) for names in trained_names(optimizer.param_groups, optimizer.handle))


def made_with(handle: Handle) -> dict[str, Any]:
    """Versions, and the backends that serve the handle's devices."""
    backends = {choose_backend(device, handle.config.backend).backend.name for device in map(handle.device_of, handle.trained)}
    return {"torch": torch.__version__, "python": platform.python_version(), "backends": sorted(backends)}
