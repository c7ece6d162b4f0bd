"""What a backend is, which ones there are, and which one serves a device, with the reason why the others do not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .calls import Draw, Momentum, Skinny, Update
from .table import TensorTable


class Backend(Protocol):
    """The ops on one kind of device; ops.py documents each. Arguments arrive checked."""

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot serve the device, or None if it can."""

    def withheld(self, device: torch.device) -> str | None:
        """Why it serves the device only when asked for by name, or None. Called where it is available."""

    def lowrank_update_(self, table: TensorTable, update: Update) -> None: ...

    def dense_update_(self, table: TensorTable, update: Update) -> None: ...

    def lowrank_momentum_(self, table: TensorTable, update: Update, momentum: Momentum) -> None: ...

    def dense_momentum_(self, table: TensorTable, update: Update, momentum: Momentum) -> None: ...

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None: ...

    def factor_update_(self, table: TensorTable, update: Update) -> None: ...

    def lowrank_merge_(self, table: TensorTable, update: Update, out: TensorTable) -> None: ...

    def dense_merge_(self, table: TensorTable, update: Update, out: TensorTable) -> None: ...

    def lowrank_linear_(self, call: Skinny) -> None: ...

    def lowrank_embedding_(self, call: Skinny) -> None: ...

    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor: ...


def name_of(backend: Backend | None) -> str:
    """A backend as library.py takes it: "" for the best."""
    return "" if backend is None else backend.name


_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Adds a backend; those registered later are preferred."""
    _BACKENDS[backend.name] = backend


@contextlib.contextmanager
def registered(backend: Backend) -> Iterator[None]:
    """A backend is there, under a new name, for as long as the body runs.

    Raises:
        ValueError: there is a backend of that name.
    """
    if backend.name in _BACKENDS:
        raise ValueError(f"there is a backend {backend.name!r} already")
    register_backend(backend)
    try:
        yield
    finally:
        del _BACKENDS[backend.name]


def backend_names() -> list[str]:
    """All registered backends, the preferred one first."""
    return list(reversed(_BACKENDS))


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that serves a device and, for each other one that was considered, why it does not."""

    backend: Backend
    rejected: dict[str, str]


def choose_backend(device: torch.device | str, name: str | None = None) -> Choice:
    """The backend for a device.

    Args:
        device: where the weights are.
        name: use this one or fail; default: the environment variable LOZO_KERNELS_BACKEND, else the first that can.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the named backend cannot serve the device.
    """
    device = torch.device(device)
    name = name or os.environ.get("LOZO_KERNELS_BACKEND") or None
    if name is not None:
        if name not in _BACKENDS:
            raise ValueError(f"no backend {name!r}; there are {', '.join(backend_names())}")
        reason = _BACKENDS[name].unavailable(device)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot serve {device}: {reason}")
        return Choice(_BACKENDS[name], {other: f"{name} was asked for" for other in backend_names() if other != name})
    rejected: dict[str, str] = {}
    for candidate in backend_names():
        backend = _BACKENDS[candidate]
        reason = backend.unavailable(device) or backend.withheld(device)
        if reason is None:
            return Choice(backend, rejected)
        rejected[candidate] = reason
    raise RuntimeError(f"no backend serves {device}: {rejected}")
