"""One pass over the weights: terms that are added to every parameter, as one call of an op per kind and device."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.calls import Draw, Rounding, Step
from ..kernels.checks import LARGEST
from ..kernels.registry import Choice
from ..kernels.table import TensorTable
from .config import PatchConfig
from .estimators import Estimator

Scalar = float | Tensor
"""A number or a tensor: 0-dim, or one value per trained parameter in the order of ``Handle.names``."""


@dataclasses.dataclass(frozen=True)
class Term:
    """One draw's part in a pass over the weights: X += (perturb + gradient) * D, N += coefficient * D."""

    draw: Draw
    perturb: float = 0.0
    """Scale of a perturbation that was made before this pass and so decays with X, or is made by it."""
    gradient: Scalar = 0.0
    """-lr * c, before the division by r that ``scaling`` asks for."""
    coefficient: Scalar = 0.0
    decays: bool = True


@dataclasses.dataclass(frozen=True)
class StepUpdate:
    """An update as :meth:`Handle.update_` takes it: c per direction, lr, weight decay and beta."""

    step: Step
    c: Sequence[Scalar]
    lr: Scalar
    weight_decay: Scalar
    beta: float | Tensor | None


@dataclasses.dataclass
class Group:
    """The parameters of one kind on one device: one op call."""

    kind: str
    index: Tensor
    """Positions of its parameters among all, for picking per-parameter scalars; on the group's device."""
    table: TensorTable
    choice: Choice
    estimator: Estimator

    def select(self, value: Scalar) -> Scalar:
        """A scalar as the ops take it: a number, or fp32 on the group's device, 0-dim or one value per parameter of the group."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.table.device, torch.float32, non_blocking=True)
        return value[self.index] if value.dim() else value

    def stack(self, values: Sequence[Scalar]) -> Scalar:
        """Selected scalars of the draws as the ops take them: (draws, parameters), or a number for all."""
        first = values[0]
        if not isinstance(first, Tensor) and all(not isinstance(v, Tensor) and v == first for v in values):
            return first
        device, count = self.table.device, len(self.table)
        rows = [v if isinstance(v, Tensor) else torch.full((), v, dtype=torch.float32, device=device) for v in values]
        return torch.stack([r.expand(count) for r in rows])

    def draws(self, terms: Sequence[Term]) -> list[Draw]:
        """The draws of the terms; steps that are tensors come to the group's device."""
        return [
            Draw(d.step.to(self.table.device, non_blocking=True), d.direction) if isinstance(d.step, Tensor) else d
            for d in (term.draw for term in terms)
        ]


def run_pass(
    groups: Sequence[Group],
    config: PatchConfig,
    terms: Sequence[Term],
    *,
    decay: Scalar | None = None,
    momentum: tuple[float | Tensor, Scalar] | None = None,
    rounding: Rounding | None = None,
    decayed_by: Scalar = 1.0,
) -> None:
    """One call of an op per kind and device. ``momentum`` is (beta, -lr)."""
    for group in groups:
        low_rank = group.kind == "lowrank"
        perturb_factor = config.perturb_factor if low_rank else 1.0
        update_factor = config.update_factor if low_rank else 1.0

        def scale(term: Term, p: float = perturb_factor, u: float = update_factor) -> Scalar:
            standing = term.perturb * p * decayed_by if term.perturb and term.decays else term.perturb * p
            return standing + (term.gradient if u == 1.0 else term.gradient * u)

        select = group.select
        table, draws = group.table, group.draws(terms)
        scales = group.stack([select(scale(term)) for term in terms])
        backend = group.choice.backend
        decay_here = None if decay is None else select(decay)
        if momentum is None:
            update = group.estimator.lowrank_update_ if low_rank else functools.partial(ops.dense_update_, seed=config.seed)
            update(table, draws=draws, scales=scales, decay=decay_here, rounding=rounding, backend=backend)
        else:
            update_momentum = (
                group.estimator.lowrank_momentum_ if low_rank else functools.partial(ops.dense_momentum_, seed=config.seed)
            )
            update_momentum(
                table,
                draws=draws,
                scales=scales,
                coefficients=group.stack([select(term.coefficient) for term in terms]),
                alpha=select(momentum[1] * update_factor),
                beta=select(momentum[0]),
                decay=decay_here,
                rounding=rounding,
                backend=backend,
            )


def run_update(
    groups: Sequence[Group], config: PatchConfig, update: StepUpdate, standing: float = 0.0, perturb_next: float | None = None
) -> None:
    """The passes of an update over the weights of some groups.

    Args:
        standing: scale of the perturbation along the last direction that is still in the weights.
        perturb_next: scale of the perturbation along direction 0 of the next step, which has the same V; None for none.
    """
    terms = []
    for d, c in enumerate(update.c):
        gradient = share(c, len(update.c))
        terms.append(
            Term(
                Draw(update.step, d),
                perturb=-standing if d == len(update.c) - 1 else 0.0,
                gradient=0.0 if update.beta is not None else gradient * -update.lr,
                coefficient=0.0 if update.beta is None else (1.0 - update.beta) * gradient,
            )
        )
    decay = decay_of(update.lr, update.weight_decay)
    if perturb_next is not None:
        terms.append(Term(Draw(update.step + 1), perturb=perturb_next, decays=False))
    chunks = [terms[i : i + ops.MAX_DRAWS] for i in range(0, len(terms), ops.MAX_DRAWS)]
    # Decay goes first, the momentum product with the last draw of this step; other chunks only add their draws.
    last = max(i for i, chunk in enumerate(chunks) if chunk[0].decays)
    for i, chunk in enumerate(chunks):
        momentum = None
        if update.beta is not None and i <= last:
            momentum = (update.beta if i == 0 else 1.0, -update.lr if i == last else 0.0)
        run_pass(
            groups,
            config,
            chunk,
            decay=decay if i == 0 else None,
            momentum=momentum,
            rounding=Rounding(update.step, i) if config.rounding == "stochastic" else None,
            decayed_by=1.0 if decay is None else decay,
        )


def check_update(update: StepUpdate, parameters: int) -> None:
    """Raises TypeError or ValueError for an update that is not made of numbers and tensors of the right shapes; reads no tensor."""
    if not update.c:
        raise ValueError("an update needs the projected gradient of one direction at least")
    rows: list[tuple[str, Any, tuple[int, ...]]] = [("c", c, (0,)) for c in update.c]
    rows += [("lr", update.lr, (0, 1)), ("weight_decay", update.weight_decay, (0, 1))]
    rows += [("beta", update.beta, (0, 1))] if update.beta is not None else []
    for name, value, dims in rows:
        if not isinstance(value, Tensor):
            if not isinstance(value, Real):
                raise TypeError(f"{name} is a number or a tensor, not {value!r:.200}")
            if LARGEST < abs(value) < math.inf:  # type: ignore[operator]
                raise ValueError(f"{name} is {value}, which is beyond fp32")
        elif value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
            raise TypeError(f"{name} is made of real numbers in storage, not {value.dtype} {value.layout} on {value.device}")
        elif value.dim() not in dims or (value.dim() and len(value) != parameters):
            each = f", or one for each of the {parameters} parameters" if 1 in dims else ""
            raise ValueError(f"{name} is one number{each}, not a tensor of shape {tuple(value.shape)}")


def share(c: Scalar, directions: int) -> Scalar:
    """A direction's part in the mean; of a tensor by a tensor, as the division of c itself."""
    if directions == 1:
        return c
    return c / torch.full_like(c, directions) if isinstance(c, Tensor) else c / directions


def decay_of(lr: Scalar, weight_decay: Scalar) -> Scalar | None:
    """What an update multiplies weights by first: 1 - lr * weight_decay; None without weight decay."""
    decaying = isinstance(weight_decay, Tensor) or weight_decay != 0.0
    return 1.0 - lr * weight_decay if decaying else None
