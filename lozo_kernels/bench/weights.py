"""The weights that ``bench perturb`` works on, and calls of the ops on them as data: what the gate checks is what is timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels import noise, ops
from ..kernels.calls import Draw
from ..kernels.registry import Backend
from ..kernels.table import TensorTable
from .models import MODELS, parameter_shapes

SEED = 0x10_20_30_40_50_60_70
WINDOW = 3
EPS = 1e-3


@dataclasses.dataclass(frozen=True)
class Weights:
    """Matrices and vectors of one dtype: one matrix, or all of a model."""

    label: str
    matrices: Sequence[Tensor]
    vectors: Sequence[Tensor] = ()

    @property
    def all(self) -> list[Tensor]:
        """Matrices, then vectors."""
        return [*self.matrices, *self.vectors]

    def lowrank_table(self, rank: int, backend: Backend) -> TensorTable:
        """The matrices with V of :data:`WINDOW` and random momentum."""
        device = self.matrices[0].device
        table = TensorTable(
            [x.unsqueeze(0) for x in self.matrices],
            [noise.tensor_id(f"{self.label}.{i}") for i in range(len(self.matrices))],
            v=[torch.zeros(1, rank, x.shape[1], dtype=torch.float16, device=device) for x in self.matrices],
            n=[torch.randn(1, x.shape[0], rank, device=device) for x in self.matrices],
        )
        ops.resample_(table, seed=SEED, window=WINDOW, backend=backend)
        return table

    def dense_table(self) -> TensorTable:
        """Matrices and vectors as flat tensors."""
        return TensorTable(
            [x.view(1, 1, -1) for x in self.all], [noise.tensor_id(f"{self.label}.{i}") for i in range(len(self.all))]
        )


def make_weights(label: str, dtype: torch.dtype, device: torch.device) -> Weights:
    """Random weights: of a model of :data:`~lozo_kernels.bench.models.MODELS`, or one matrix "RxC".

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
        tensors = [random(*shape) for shape in shapes]
    except RuntimeError as e:  # torch's out-of-memory errors have no common class of their own
        raise InputError(f"{label} in {str(dtype).removeprefix('torch.')} cannot be allocated: {str(e).splitlines()[0]}") from None
    return Weights(label, [x for x in tensors if x.dim() == 2], [x for x in tensors if x.dim() == 1])


def nbytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of all elements."""
    return sum(t.numel() * t.element_size() for t in tensors)


@dataclasses.dataclass
class OpCall:
    """One op with all of its arguments. Each run flips the signs of the scales, so that timed weights stay where they are.

    Attributes:
        op: "lowrank_update", "dense_update" or "lowrank_momentum".
        scales, coefficients: one per draw.
        alpha: of the next run.
    """

    op: str
    table: TensorTable
    draws: Sequence[Draw]
    scales: Sequence[float]
    backend: Backend
    coefficients: Sequence[float] = ()
    alpha: float = 0.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        # On the device beforehand, as in a training step: uploading a number would wait for the device in every call.
        shape = (len(self.draws), len(self.table))
        self._arguments = {"scales": self._tensor(self.scales, shape)}
        self._fixed: dict[str, Tensor] = {}
        if self.op == "lowrank_momentum":
            self._arguments |= {
                "coefficients": self._tensor(self.coefficients, shape),
                "alpha": self._tensor([self.alpha], shape[1:]),
            }
            self._fixed["beta"] = self._tensor([self.beta], shape[1:])
        self._negated = {name: -value for name, value in self._arguments.items()}

    def _tensor(self, values: Sequence[float], shape: tuple[int, ...]) -> Tensor:
        rows = torch.tensor(values, dtype=torch.float32, device=self.table.device)
        return (rows[:, None] if len(shape) == 2 else rows).expand(shape).contiguous()

    def run(self) -> None:
        """The call."""
        op = getattr(ops, f"{self.op}_")
        op(self.table, seed=SEED, draws=self.draws, backend=self.backend, **self._arguments, **self._fixed)
        self._arguments, self._negated = self._negated, self._arguments
        self.scales = [-s for s in self.scales]
        self.coefficients = [-c for c in self.coefficients]
        self.alpha = -self.alpha


def lowrank_calls(table: TensorTable, backend: Backend) -> dict[str, OpCall]:
    """The low-rank ops by row name, as a training step makes them, on a table with momentum.

    ``lowrank_update`` is a perturbation or an update; ``lowrank_update_2`` a restore fused with another draw;
    ``lowrank_momentum`` the update of LOZO-M, which restores in the same pass.
    """
    one, two = [Draw(7)], [Draw(7), Draw(8)]
    return {
        "lowrank_update": OpCall("lowrank_update", table, one, [EPS], backend),
        "lowrank_update_2": OpCall("lowrank_update", table, two, [EPS, -EPS], backend),
        "lowrank_momentum": OpCall("lowrank_momentum", table, one, [EPS], backend, coefficients=[0.1], alpha=-1e-4, beta=0.9),
    }


def dense_calls(table: TensorTable, backend: Backend) -> dict[str, OpCall]:
    """The dense op by row name."""
    return {"dense_update": OpCall("dense_update", table, [Draw(7)], [EPS], backend)}
