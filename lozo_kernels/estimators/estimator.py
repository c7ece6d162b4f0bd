"""What the engine asks of an estimator: the ops along its directions."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..config import PatchConfig
from ..ops import Scalars
from ..registry import Backend, Draw, Rounding
from ..table import TensorTable


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
    :mod:`lozo_kernels.ops`, with L in place of U.

    Attributes:
        name: as in :class:`~lozo_kernels.config.PatchConfig`.
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
