"""The weights that ``bench perturb`` works on, and calls of ops on them as objects, so that the gate checks what is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import noise, ops
from ..kernels.calls import Draw
from ..kernels.registry import Backend
from ..kernels.table import TensorTable
from .cases import OPS, Case
from .models import MODELS, parameter_shapes

SEED = 0x10_20_30_40_50_60_70
WINDOW = 3
EPS = 1e-3
PARTS = 16
"""The parts of a batch that a signed update is measured with."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Matrices and vectors of one dtype: a single matrix, or all weights of a model."""

    label: str
    matrices: Sequence[Tensor]
    vectors: Sequence[Tensor] = ()

    @property
    def all(self) -> list[Tensor]:
        """The matrices, then the vectors."""
        return [*self.matrices, *self.vectors]

    def lowrank_table(self, rank: int, backend: Backend) -> TensorTable:
        """Makes a table of the matrices with V of :data:`WINDOW` and random momentum."""
        device = self.matrices[0].device
        table = TensorTable(
            [x.unsqueeze(0) for x in self.matrices],
            [noise.tensor_id(f"{self.label}.{i}") for i in range(len(self.matrices))],
            v=[torch.zeros(1, rank, x.shape[1], dtype=torch.float16, device=device) for x in self.matrices],
            n=[torch.randn(1, x.shape[0], rank, device=device, dtype=torch.float32) for x in self.matrices],
        )
        ops.resample_(table, seed=SEED, window=WINDOW, backend=backend)
        return table

    def dense_table(self) -> TensorTable:
        """Makes a table of matrices and vectors as flat tensors."""
        return TensorTable(
            [x.view(1, 1, -1) for x in self.all], [noise.tensor_id(f"{self.label}.{i}") for i in range(len(self.all))]
        )


def make_weights(label: str, dtype: torch.dtype, device: torch.device) -> Weights:
    """Makes random weights: those of a model of :data:`~lozo_kernels.bench.models.MODELS`, or one matrix "RxC".

    Raises:
        InputError: they do not fit into memory, or transformers, which makes a model's shapes, is not installed.
    """
    if label in MODELS:
        shapes = [shape for _, shape in parameter_shapes(label)]
    else:
        rows, cols = map(int, label.split("x"))
        shapes = [(rows, cols)]

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)

    try:
        tensors = list(starmap(random, shapes))
    except RuntimeError as e:  # torch's out-of-memory errors have no common class of their own
        raise InputError(f"{label} in {str(dtype).removeprefix('torch.')} cannot be allocated: {str(e).splitlines()[0]}") from None
    return Weights(label, [x for x in tensors if x.dim() == 2], [x for x in tensors if x.dim() == 1])


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Counts the bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


class OpCall:
    """One op with all of its arguments. Each run flips the signs of what it adds, so that the weights stay where they are.

    Args:
        case: has one scale and one coefficient of momentum for each draw, or a scale for each part of a batch, and one alpha and
            beta for all tensors.

    Attributes:
        case: what the next run does.
    """

    def __init__(self, case: Case, backend: Backend) -> None:
        self.case, self.backend = case, backend
        table, call = case.table, case.call
        shapes = {"alpha": (len(table),), "beta": (len(table),)}
        # On the device beforehand, as in a training step: uploading a number would wait for the device in every call.
        for name in ("scales", "coefficients", *shapes):
            if name in call:
                values = torch.tensor(call[name], dtype=torch.float32, device=table.device).unsqueeze(-1)
                call[name] = values.expand(shapes.get(name, (len(values), len(table)))).contiguous()
        self._other = {name: -call[name] for name in ("scales", "coefficients", "alpha") if name in call}

    def run(self) -> None:
        """Makes the call."""
        self.case.run(self.backend)
        now = {name: self.case.call[name] for name in self._other}
        self.case.call, self._other = self.case.call | self._other, now


def lowrank_calls(table: TensorTable, backend: Backend) -> dict[str, OpCall]:
    """Makes calls of the low-rank ops, by the names of their rows, as a training step makes them on a table with momentum.

    ``lowrank_update`` is a perturbation or an update; ``lowrank_update_2`` a restore fused with another draw;
    ``lowrank_momentum`` the update of LOZO-M, which restores in the same pass; ``lowrank_signed_update`` that of GRZO.
    """
    momentum = {"coefficients": [0.1], "alpha": -1e-4, "beta": 0.9}
    return {
        "lowrank_update": _call("lowrank_update_", table, backend, scales=[EPS]),
        "lowrank_update_2": _call("lowrank_update_", table, backend, scales=[EPS, -EPS]),
        "lowrank_momentum": _call("lowrank_momentum_", table, backend, scales=[EPS], **momentum),
        "lowrank_signed_update": _call("lowrank_signed_update_", table, backend, scales=[EPS] * PARTS),
    }


def dense_calls(table: TensorTable, backend: Backend) -> dict[str, OpCall]:
    """Makes the calls of the dense op, by the names of their rows: with normal numbers, and with signs."""
    return {
        "dense_update": _call("dense_update_", table, backend, scales=[EPS]),
        "dense_update_signs": _call("dense_update_", table, backend, scales=[EPS], law="rademacher"),
    }


def _call(op: str, table: TensorTable, backend: Backend, *, scales: list[float], **more: Any) -> OpCall:
    draws = [Draw(7 + i) for i in range(1 if OPS[op].signed else len(scales))]
    return OpCall(Case(OPS[op], table, {"seed": SEED, "draws": draws, "scales": scales, **more}), backend)
