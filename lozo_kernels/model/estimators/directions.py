"""What the engine asks of an estimator: the ops along its directions."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.calls import Draw, Rounding
from ...kernels.ops import Scalars
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor as its factors are made: ``extent`` is (batch, rows, cols)."""

    tensor_id: int
    extent: tuple[int, int, int]
    backend: Backend
    device: torch.device


class Estimator(abc.ABC):
    """How the directions of matrices are made: L V^T, with L new at every draw and V kept for a window of steps.

    One object serves one handle. Vectors, and matrices where :attr:`low_rank` is False, have dense Gaussian directions instead,
    which are the same for all estimators. Arguments of the methods are those of the ops of the same name in
    :mod:`lozo_kernels.kernels.ops`, with L in place of U.

    Attributes:
        name: as in :class:`~lozo_kernels.model.config.PatchConfig`.
        low_rank: whether matrices have such directions.
    """

    name: ClassVar[str]
    low_rank: ClassVar[bool] = True

    def __init__(self, config: PatchConfig) -> None:
        self.config = config

    @abc.abstractmethod
    def left(self, place: Place, draw: Draw) -> Tensor:
        """L of one tensor: (batch, rows, rank) fp32. The step of the draw is a number."""

    @abc.abstractmethod
    def right(self, place: Place, window: int) -> Tensor:
        """V of one tensor, transposed: (batch, rank, cols) fp32."""

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        """V of a window, for all of a table of weights."""
        ops.resample_(table, seed=self.config.seed, window=window, reproject=reproject, backend=backend)

    def lowrank_update_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw],
        scales: Scalars,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        backend: Backend,
    ) -> None:
        """X <- decay * X + sum over draws of scale * L V^T."""
        ops.lowrank_update_(
            table, seed=self.config.seed, draws=draws, scales=scales, decay=decay, rounding=rounding, backend=backend
        )

    def lowrank_momentum_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw],
        scales: Scalars,
        coefficients: Scalars,
        alpha: Scalars,
        beta: Scalars,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        backend: Backend,
    ) -> None:
        """N <- beta * N + sum of coefficient * L, then X <- decay * X + sum of scale * L V^T + alpha * N V^T."""
        ops.lowrank_momentum_(
            table,
            seed=self.config.seed,
            draws=draws,
            scales=scales,
            coefficients=coefficients,
            alpha=alpha,
            beta=beta,
            decay=decay,
            rounding=rounding,
            backend=backend,
        )

    def factor_update_(
        self, table: TensorTable, *, draws: Sequence[Draw], scales: Scalars, decay: Scalars | None = None, backend: Backend
    ) -> None:
        """F <- decay * F + sum over draws of scale * L, for a table of factors."""
        ops.factor_update_(table, seed=self.config.seed, draws=draws, scales=scales, decay=decay, backend=backend)

    def lowrank_merge_(
        self,
        table: TensorTable,
        *,
        draws: Sequence[Draw] = (),
        scales: Scalars = 0.0,
        decay: Scalars | None = None,
        rounding: Rounding | None = None,
        out: TensorTable | None = None,
        backend: Backend,
    ) -> None:
        """OUT <- decay * X + (N + scale * L) V^T."""
        ops.lowrank_merge_(
            table, seed=self.config.seed, draws=draws, scales=scales, decay=decay, rounding=rounding, out=out, backend=backend
        )


class Dense(Estimator):
    """Z of the weight's own shape; nothing has low-rank factors."""

    name = "dense"
    low_rank = False

    def left(self, place: Place, draw: Draw) -> Tensor:
        """There is none."""
        raise TypeError("dense directions have no factors")

    def right(self, place: Place, window: int) -> Tensor:
        """There is none."""
        raise TypeError("dense directions have no factors")


class LowRank(Estimator):
    """U V^T, U new at every step, V every ``interval`` steps; with ``interval=1`` the plain LGE."""

    name = "lowrank"

    def left(self, place: Place, draw: Draw) -> Tensor:
        """U."""
        return self._factor(place, place.extent[1], draw, "U")

    def right(self, place: Place, window: int) -> Tensor:
        """V."""
        return self._factor(place, place.extent[2], Draw(window), "V").transpose(1, 2)

    def _factor(self, place: Place, rows: int, draw: Draw, stream: str) -> Tensor:
        batch, (seed, rank) = place.extent[0], (self.config.seed, self.config.rank)
        rest = {"stream": stream, "device": place.device, "backend": place.backend}
        return ops.factor(seed, batch * rows, rank, place.tensor_id, draw, **rest).view(batch, rows, rank)  # type: ignore[arg-type]
