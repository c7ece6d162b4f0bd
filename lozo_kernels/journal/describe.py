"""Describes a model and the libraries in use for the header of a journal."""

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
    """The trained parameters, with fingerprints of their weights as they are now, or with empty ones."""
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
    """The versions of the libraries, the backends that serve the handle's devices, and the names that were hashed again, if any."""
    backends = {choose_backend(device, handle.config.backend).backend.name for device in map(handle.device_of, handle.trained)}
    again = [p.name for p in handle.trained if p.hashed_again]
    found = {"torch": torch.__version__, "python": platform.python_version(), "backends": sorted(backends)}
    return found | ({"hashed_again": again} if again else {})
