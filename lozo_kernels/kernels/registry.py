"""What a backend is, which backends are registered, and which of them serves a device."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .calls import Draw, LayerCall, PointsCall, TableCall
from .op_table import Op
from .table import TensorTable


class Backend(abc.ABC):
    """The ops on one kind of device. ``ops.py`` and ``skinny.py`` document the ops, whose arguments arrive checked."""

    name: str
    many_draws = False
    """Whether ops on factors take any number of draws; otherwise they are given a few at a time."""

    @abc.abstractmethod
    def unavailable(self, device: torch.device) -> str | None:
        """Returns why this backend cannot serve the device, or None if it can."""

    def opt_in_reason(self, device: torch.device) -> str | None:  # noqa: ARG002  (some backends look at it)
        """Returns why it serves the device only when it is asked for by name, or None. Called only if it is available."""
        return None

    @abc.abstractmethod
    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        """Runs an op of :data:`~.op_table.OPS` that is not ``summed``."""

    @abc.abstractmethod
    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None: ...

    @abc.abstractmethod
    def lowrank_linear_(self, call: LayerCall) -> None: ...

    @abc.abstractmethod
    def lowrank_embedding_(self, call: LayerCall) -> None: ...

    @abc.abstractmethod
    def lowrank_points_(self, call: PointsCall) -> None: ...

    @abc.abstractmethod
    def factor(
        self, seed: int, rows: int, rank: int, tensor_id: int, draw: Draw, *, stream: str, row_offset: int, device: torch.device
    ) -> Tensor: ...


_BACKENDS: dict[str, Backend] = {}


def register_backend(backend: Backend) -> None:
    """Registers a backend. Those registered later are preferred."""
    _BACKENDS[backend.name] = backend


@contextlib.contextmanager
def registered(backend: Backend) -> Iterator[None]:
    """Registers a backend under a new name while the body runs. Raises ValueError if there is a backend of that name."""
    if backend.name in _BACKENDS:
        raise ValueError(f"there is a backend {backend.name!r} already")
    register_backend(backend)
    try:
        yield
    finally:
        del _BACKENDS[backend.name]


def backend_names() -> list[str]:
    """The names of all registered backends, the preferred one first."""
    return list(reversed(_BACKENDS))


@dataclasses.dataclass(frozen=True)
class Choice:
    """The backend that serves a device and, for each other one that was considered, the reason why it does not."""

    backend: Backend
    rejected: dict[str, str]


def choose_backend(device: torch.device | str, name: str | None = None) -> Choice:
    """Chooses the backend for a device.

    Args:
        device: where the weights are.
        name: use this backend or fail. Default: the environment variable LOZO_KERNELS_BACKEND, else the first that can serve.

    Raises:
        ValueError: there is no backend of that name, or LOZO_KERNELS_ISA names no instruction set of this machine.
        RuntimeError: the named backend, or without a name every backend, cannot serve the device.
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
        reason = backend.unavailable(device) or backend.opt_in_reason(device)
        if reason is None:
            return Choice(backend, rejected)
        rejected[candidate] = reason
    raise RuntimeError(f"no backend serves {device}: {rejected}")
