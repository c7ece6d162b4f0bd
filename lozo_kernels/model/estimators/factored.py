"""Directions L V^T whose L is not the U of the noise: what such estimators share, and the class for those of others.

A pass over the weights adds the draws to a factor, F = sum of scale * L, and merges it: X <- decay * X + F V^T, as a probe merges
what it learned. So an estimator only says what L and V are.
"""

from __future__ import annotations

import abc
import functools
from typing import ClassVar

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.calls import Draw, TableCall
from ...kernels.op_table import Op
from ...kernels.registry import Backend
from ...kernels.summed import add_carried, run_probed, run_summed
from ...kernels.table import TensorTable
from ..config import PatchConfig
from .directions import Estimator, FactorSpec, replace_v, specs_of

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
        for t, (spec, v) in enumerate(zip(specs_of(table, backend), table.v, strict=True)):
            new = self._checked("right", self.right(spec, window), tuple(v.shape))
            if not torch.equal(new, new.half().to(new.dtype)):  # once a window: it waits for the device
                raise ValueError(
                    f"right() of {self.label} returns values that fp16 does not have: round them, e.g. .half().float()"
                )
            replace_v(table, t, new, reproject=reproject)
            self._enter(spec, window)
        self._left.clear()

    def run(self, op: Op, table: TensorTable, call: TableCall, backend: Backend) -> None:
        again = functools.partial(self.run, backend=backend)
        if op.factors:
            self._run_on_factors(op, table, call)
        elif not op.out:
            run_summed(op, table, call, again)
        elif call.draws:
            run_probed(op, table, call, again)
        else:
            ops.dispatch(op, table, call, backend)

    def _enter(self, spec: FactorSpec, window: int) -> None:  # noqa: ARG002  (for what belongs to a window)
        """Called for every tensor when its V was drawn."""
        self._specs[spec.tensor_id] = spec

    def _key_of(self, call: TableCall, draw: Draw) -> Key:
        if isinstance(draw.step, Tensor):
            raise NotImplementedError(f"{self.label} cannot be captured: its directions are drawn for a step that is a number")
        return call.seed, draw.step, draw.direction

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

    def _run_on_factors(self, op: Op, table: TensorTable, call: TableCall) -> None:
        """F <- decay * F + sum of scale * L; with momentum also N <- beta * N + sum of coefficient * L, and last F + alpha * N."""
        sums, n = [(table.x, call.decay, call.scales)], table.n
        if op.momentum:
            assert n is not None and call.coefficients is not None
            sums.append((n, call.beta, call.coefficients))
        for factors, decay, _ in sums:
            for f, one in zip(factors, decay.unbind(), strict=True) if decay is not None else ():
                f.mul_(one)
        for d, draw in enumerate(call.draws):
            key = self._key_of(call, draw)
            for t, tensor_id in enumerate(table.tensor_ids):
                left = self._left_of(tensor_id, key, table.x[t].device)
                for factors, _, scales in sums:
                    factors[t].add_(left * scales[d, t])  # two operations, each rounded
        if op.momentum:
            assert n is not None and call.alpha is not None
            add_carried(table, n, call.alpha)
