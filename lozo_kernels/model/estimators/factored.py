"""Directions L V^T whose L is not the U of the noise: what such estimators share, and the class for those of others.

A pass over the weights adds the draws to a factor, F = sum of scale * L, and merges it: X <- decay * X + F V^T, as a probe merges
what it learned. So an estimator only says what L and V are.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import Op
from ...kernels.registry import Backend
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import Estimator, FactorSpec
from .summed import add_momentum, merge_factor, replace_v, with_factor

Key = tuple[int, int, int]
"""Which draw: the seed, the step and the direction."""


class FactoredEstimator(Estimator, abc.ABC):
    """Directions D = L V^T of matrices, L (rows x rank) new at every draw and V (columns x rank) kept for a window of steps.

    The estimate is c D with c = (F(X + eps D) - F(X - eps D)) / (2 eps), and the update is X <- X - lr c D: the scale of D is the
    estimator's own. L and V follow from ``config.seed`` and their arguments alone, so that any process, a resumed run and a replay
    make them again; :func:`lozo_kernels.ops.factor` makes normal numbers that do. One object serves one handle.

    Subclasses define :attr:`name`, :meth:`left` and :meth:`right`, and :func:`lozo_kernels.register_estimator` makes an optimiser
    of them. V is stored in fp16, so :meth:`right` returns values that fp16 has.
    """

    label: ClassVar[str] = ""
    """The method as messages call it; the name of the class if it is left out."""

    def __init_subclass__(cls) -> None:
        cls.label = cls.__dict__.get("label", cls.__name__)

    def __init__(self, config: PatchConfig) -> None:
        super().__init__(config)
        self._specs: dict[int, FactorSpec] = {}
        self._left: dict[int, tuple[Key, Tensor]] = {}

    def resample_(self, table: TensorTable, *, window: int, reproject: bool, backend: Backend) -> None:
        assert table.v is not None
        for t, (x, v, tensor_id) in enumerate(zip(table.x, table.v, table.tensor_ids, strict=True)):
            spec = FactorSpec(tensor_id, (x.shape[0], x.shape[1], x.shape[2]), backend, x.device)
            new = self._checked("right", self.right(spec, window), tuple(v.shape))
            if not torch.equal(new, new.half().to(new.dtype)):  # once a window: it waits for the device
                raise ValueError(
                    f"right() of {self.label} returns values that fp16 does not have: round them, e.g. .half().float()"
                )
            replace_v(table, t, new, reproject=reproject)
            self._enter(spec, window)
        self._left.clear()

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Adds the draws to a factor, each by a rounded multiply and a rounded add in order, and merges it into the weights."""
        if op.factors:
            if call.decay is not None:
                for f, decay in zip(table.x, call.decay.unbind(), strict=True):
                    f.mul_(decay)
            self._add(table, table.x, call, call.scales)
        elif op.out:
            self._merge(table, call, backend)
        else:
            step = with_factor(table)
            assert step.n is not None
            for p in step.n:
                p.zero_()
            if op.momentum:
                self._carry(table, call)
            self._add(table, step.n, call, call.scales)
            if op.momentum:
                assert table.n is not None
                add_momentum(step, self.moved(table.n, table.tensor_ids), call)
            merge_factor(step, call, None, backend)

    def _enter(self, spec: FactorSpec, window: int) -> None:  # noqa: ARG002  (for what belongs to a window)
        """Called for every tensor when its V was drawn."""
        self._specs[spec.tensor_id] = spec

    def _left_of(self, tensor_id: int, key: Key, device: torch.device) -> Tensor:
        """L for the window in memory. The last one of every tensor is kept, since a step uses it three times."""
        kept = self._left.get(tensor_id)
        if kept is None or kept[0] != key or kept[1].device != device:
            kept = self._left[tensor_id] = (key, self._make_left(tensor_id, key, device))
        return kept[1]

    def _make_left(self, tensor_id: int, key: Key, device: torch.device) -> Tensor:
        spec, (seed, step, direction) = self._specs[tensor_id], key
        if seed != self.config.seed:
            raise NotImplementedError(f"{self.label} has the directions of one seed")
        made = self.left(spec, Draw(step, direction))
        return self._checked("left", made, (*spec.extent[:2], self.config.rank)).to(device, torch.float32)

    def _checked(self, method: str, made: Tensor, shape: tuple[int, ...]) -> Tensor:
        if not isinstance(made, Tensor) or tuple(made.shape) != shape:
            found = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(f"{method}() of {self.label} returns a tensor of shape {shape}, not {found}")
        return made

    def _carry(self, table: TensorTable, call: TableCall) -> None:
        """N <- beta * N + sum of coefficient * L."""
        assert table.n is not None and call.beta is not None and call.coefficients is not None
        for n, beta in zip(table.n, call.beta.unbind(), strict=True):
            n.mul_(beta)
        self._add(table, table.n, call, call.coefficients)

    def _merge(self, table: TensorTable, call: TableCall, backend: Backend) -> None:
        """Merges the factor of a table. A draw is added to a copy of it."""
        if not call.draws:
            merge_factor(table, call, call.out, backend)
            return
        at = with_factor(table)
        assert table.n is not None and at.n is not None
        for p, n in zip(at.n, table.n, strict=True):
            p.copy_(n)
        self._add(table, at.n, call, call.scales)
        merge_factor(at, call, table if call.out is None else call.out, backend)

    def _add(self, table: TensorTable, factors: Sequence[Tensor], call: TableCall, scales: Tensor) -> None:
        """F <- F + sum of scale * L, a rounded multiply and a rounded add each."""
        for draw, row in zip(call.draws, scales.unbind(), strict=True):
            if isinstance(draw.step, Tensor):
                raise NotImplementedError(f"{self.label} cannot be captured: its directions are drawn for a step that is a number")
            key = (call.seed, draw.step, draw.direction)
            for f, tensor_id, scale in zip(factors, table.tensor_ids, row.unbind(), strict=True):
                f.add_(self._left_of(tensor_id, key, f.device) * scale)
