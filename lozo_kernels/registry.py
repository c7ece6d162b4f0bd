"""What a backend is, which ones there are, and which one serves a device, with the reason why the others do not."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .table import TensorTable

Step = int | Tensor
"""A step: a number, or a 0-dim int64 tensor on the table's device, which is not read on the host (a captured graph advances it)."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """Which noise: the step of U or Z, and the index among the directions of that step."""

    step: Step
    direction: int = 0


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Stochastic rounding of one pass: the step, and the index of the pass among those of the step that round so."""

    step: Step
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """One pass over the weights. Tensors are contiguous fp32 on the table's device.

    Attributes:
        seed: 64-bit seed of the run.
        draws: one or two; none or one for a merge.
        scales: (draws, tensors).
        decay: (tensors,), or None for 1.
        rounding: None for to nearest even.
    """

    seed: int
    draws: Sequence[Draw]
    scales: Tensor
    decay: Tensor | None
    rounding: Rounding | None


@dataclasses.dataclass(frozen=True)
class Momentum:
    """What a pass does with momentum besides: coefficients (draws, tensors), alpha and beta (tensors,), as in :class:`Update`."""

    coefficients: Tensor
    alpha: Tensor
    beta: Tensor


@dataclasses.dataclass(slots=True)  # not frozen, which would double the time of making one after every layer
class Skinny:
    """A product of activations with a weight's factors, added to the outputs of the weight at rest; see ``skinny.py``.

    The tokens are equal blocks, one for each row of ``draws``: evaluations that share a forward pass. Tensors are on one device,
    2-d ones have unit column stride, those of the factors are contiguous.

    Attributes:
        y: (tokens, outputs), any weight dtype; changed in place.
        x: (tokens, inputs), any weight dtype; or for an embedding (tokens,) int64 or int32 rows.
        v: (rank, cols) fp16, V transposed.
        b: (rows, rank) fp32.
        seed, tensor_id, row_offset: place of U in the noise.
        draws: (groups, 2) int64: step and direction.
        scales: (groups,) fp32: a group's factor is B + scale * U.
        transposed: X W instead of X W^T.
        gain: (1,) fp32 that multiplies y first, or None.
        shift: (groups, outputs) fp32 that is added last, or None.
    """

    y: Tensor
    x: Tensor
    v: Tensor
    b: Tensor
    seed: int
    tensor_id: int
    row_offset: int
    draws: Tensor
    scales: Tensor
    transposed: bool = False
    gain: Tensor | None = None
    shift: Tensor | None = None


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


def signed_seed(seed: int) -> int:
    """The 64 bits of a seed as library.py takes them."""
    return seed - (1 << 64) if seed >= 1 << 63 else seed


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
