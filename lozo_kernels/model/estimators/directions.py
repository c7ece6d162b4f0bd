"""How directions are made: the interface of an estimator, and the directions of LOZO and of MeZO."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels import ops, reference
from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig


@dataclasses.dataclass(frozen=True)
class FactorSpec:
    """The parameter whose factors are made: its tensor id, its (batch, rows, cols), and the backend and device that make them."""

    tensor_id: int
    extent: tuple[int, int, int]
    backend: Backend
    device: torch.device


class Estimator(abc.ABC):
    """Makes the directions of matrices, L V^T, where L is new for every draw and V is kept for a window of steps.

    One object serves one handle. Vectors, and matrices where :attr:`low_rank` is False, have dense directions instead, of the
    config's law, which are the same for all estimators.

    Attributes:
        name: as in :class:`~lozo_kernels.model.config.PatchConfig`.
        low_rank: matrices have directions L V^T.
        carries: updates are made of N, without momentum (beta = 0) too.
    """

    name: ClassVar[str]
    low_rank: ClassVar[bool] = True
    carries: ClassVar[bool] = False

    def __init__(self, config: PatchConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def left(self, spec: FactorSpec, draw: Draw) -> Tensor:
        """Returns L of one parameter, (batch, rows, rank) fp32. The step of the draw is a number."""

    @abc.abstractmethod
    def right(self, spec: FactorSpec, window: int) -> Tensor:
        """Returns V of one parameter, transposed, (batch, rank, cols) fp32."""

    def direction(self, spec: FactorSpec, draw: Draw) -> Tensor:
        """Returns the direction of one parameter, (batch, rows, cols) fp32. The step of the draw is a number."""
        left, right = self.left(spec, draw), self.right(spec, int(draw.step) // self.config.interval)
        return reference.low_rank_product(left, right)

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        """Writes the V of a window into a table of weights, as :func:`lozo_kernels.ops.resample_` does."""
        ops.resample_(table, seed=self.config.seed, window=window, reproject=reproject, backend=backend)

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Runs an op of :data:`lozo_kernels.ops.OPS` on low-rank tensors or on factors, with L in place of U."""
        ops.dispatch(op, table, call, backend)


class Dense(Estimator):
    """Directions Z of the weight's own shape, without factors."""

    name = "dense"
    low_rank = False

    def left(self, spec: FactorSpec, draw: Draw) -> Tensor:
        raise NotImplementedError("dense directions have no factors")

    def right(self, spec: FactorSpec, window: int) -> Tensor:
        raise NotImplementedError("dense directions have no factors")


class LowRank(Estimator):
    """Directions U V^T with a new U at every step and a new V every ``interval`` steps; with ``interval=1`` the plain LGE."""

    name = "lowrank"

    def left(self, spec: FactorSpec, draw: Draw) -> Tensor:
        return self._factor(spec, spec.extent[1], draw, "U")

    def right(self, spec: FactorSpec, window: int) -> Tensor:
        return self._factor(spec, spec.extent[2], Draw(window), "V").transpose(1, 2)

    def _write_right(self, table: TensorTable, window: int, backend: Backend, *, reproject: bool) -> None:
        """:meth:`resample_` with the V of :meth:`right`, for those whose V is not the noise's."""
        for t, spec in enumerate(specs_of(table, backend)):
            replace_v(table, t, self.right(spec, window), reproject=reproject)

    def _factor(self, spec: FactorSpec, rows: int, draw: Draw, stream: str) -> Tensor:
        batch, rank = spec.extent[0], self.config.rank
        made = ops.factor(
            self.config.seed,
            batch * rows,
            rank,
            spec.tensor_id,
            draw,
            stream=stream,
            device=spec.device,
            backend=spec.backend,
        )
        return made.view(batch, rows, rank)


def specs_of(table: TensorTable, backend: Backend) -> list[FactorSpec]:
    """What the factors of each tensor of a table are made of."""
    return [
        FactorSpec(tensor_id, (x.shape[0], x.shape[1], x.shape[2]), backend, x.device)
        for x, tensor_id in zip(table.x, table.tensor_ids, strict=True)
    ]


def replace_v(table: TensorTable, t: int, new: Tensor, *, reproject: bool) -> None:
    """Gives a tensor of a table its next V (transposed), and with ``reproject`` carries its momentum over to it."""
    assert table.v is not None
    if reproject:
        assert table.n is not None
        table.n[t].copy_(reference.reproject(table.n[t], table.v[t], new))
    table.v[t].copy_(new)
