"""Passes over the weights. A pass adds terms to every parameter, with one call of an op for each kind and device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.calls import Draw, Rounding, Step, TableCall
from ..kernels.checks import LARGEST
from ..kernels.op_table import MAX_DRAWS, OPS, Op
from ..kernels.registry import Backend
from ..kernels.table import TensorTable
from .config import PatchConfig
from .estimators import Estimator

Scalar = float | Tensor
"""A number or a tensor: 0-dim, or one value per trained parameter in the order of ``Handle.names``."""


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of a step, as :meth:`Handle.update_` takes it.

    Attributes:
        step: the step whose directions were evaluated.
        c: projected gradients, one for each direction.
        lr, weight_decay: numbers, 0-dim tensors, or one value per trained parameter.
        beta: momentum coefficient, None for no momentum.
    """

    step: Step
    c: Sequence[Scalar]
    lr: Scalar
    weight_decay: Scalar
    beta: float | Tensor | None


@dataclasses.dataclass(frozen=True)
class Term:
    """One draw's part in a pass over the weights: X += (perturb + gradient) * D and, with momentum, N += coefficient * D."""

    draw: Draw
    perturb: float = 0.0
    """Scale of a perturbation that this pass makes, or takes out. With ``decays`` it is in the weights, and decays with them."""
    gradient: Scalar = 0.0
    """-lr * c, without the factor that ``scaling`` asks for."""
    coefficient: Scalar = 0.0
    decays: bool = True


@dataclasses.dataclass(frozen=True)
class Carried:
    """The momentum of a pass: N <- beta N + the terms' coefficient * D, and then X += alpha N V^T."""

    beta: Scalar
    alpha: Scalar
    """-lr, without the factor that ``scaling`` asks for."""


@dataclasses.dataclass(eq=False)
class Group:
    """The parameters of one kind on one device, for which each pass is one call of an op.

    Attributes:
        kind: "lowrank" or "dense".
        index: positions of its parameters among all trained ones, which pick per-parameter scalars; on the group's device.
        table: their weights.
    """

    kind: str
    index: Tensor
    table: TensorTable
    backend: Backend
    estimator: Estimator
    config: PatchConfig
    rounds: bool = dataclasses.field(init=False)
    """Whether updates round stochastically."""
    common: bool = dataclasses.field(init=False)
    """Whether the directions of all parts of a batch are one here, where matrices have one for each."""

    def __post_init__(self) -> None:
        low_rank, self.rounds = self.kind == "lowrank", self.config.rounding == "stochastic"
        self.count, self.device = len(self.table), self.table.device
        self.perturb_factor = self.config.perturb_factor if low_rank else 1.0
        self.update_factor = self.config.update_factor if low_rank else 1.0
        self._run = self.estimator.run if low_rank else ops.dispatch
        self._law = "normal" if low_rank else self.config.directions_law
        self._update = OPS[f"{self.kind}_update_"]
        self._momentum = OPS[f"{self.kind}_momentum_"]
        self.common = self.config.per_example and not low_rank
        self.table.check_positions(factors=low_rank, flat=not low_rank or self.rounds)

    def apply(
        self,
        terms: Sequence[Term],
        *,
        decay: Scalar | None = None,
        decayed: Scalar | None = None,
        carried: Carried | None = None,
        rounding: Rounding | None = None,
        seed: int | None = None,
    ) -> None:
        """Runs one pass: X <- decay * X + the terms; with ``carried``, momentum too.

        Args:
            decayed: the decay of X, this pass included, since the perturbations were made that the terms take out.
            seed: of the noise; None for that of the config.
        """
        scales = self.rows([self._scale(term, decayed) for term in terms])
        call = TableCall(
            self.config.seed if seed is None else seed,
            self.draws(terms),
            scales,
            None if decay is None else self.row(decay),
            rounding,
            law=self._law,
        )
        if carried is None:
            self.run(self._update, call)
            return
        call.coefficients = self.rows([term.coefficient for term in terms])
        call.alpha, call.beta = self.row(carried.alpha * self.update_factor), self.row(carried.beta)
        self.run(self._momentum, call)

    @property
    def most_draws(self) -> int | None:
        """How many draws a pass can add; None: any number."""
        return None if self.kind == "lowrank" else MAX_DRAWS

    def run(self, op: Op, call: TableCall) -> None:
        """Runs an op on the group's table, with the directions of its kind."""
        self._run(op, self.table, call, self.backend)

    def _scale(self, term: Term, decayed: Scalar | None) -> Scalar:
        applied: Scalar = term.perturb * self.perturb_factor
        if term.perturb and term.decays and decayed is not None:
            applied = applied * decayed
        return applied + (term.gradient if self.update_factor == 1.0 else term.gradient * self.update_factor)

    def row(self, value: Scalar) -> Tensor:
        """A scalar in the form that ops take: (parameters of the group,) fp32 on its device."""
        if isinstance(value, Tensor):
            value = value.to(self.device, torch.float32, non_blocking=True)
            return value[self.index] if value.dim() else value.expand(self.count).contiguous()
        return torch.full((self.count,), value, dtype=torch.float32, device=self.device)

    def rows(self, values: Sequence[Scalar]) -> Tensor:
        """The scalars of several draws: (draws, parameters of the group)."""
        return torch.stack([self.row(value) for value in values]) if len(values) > 1 else self.row(values[0]).unsqueeze(0)

    def draws(self, terms: Sequence[Term]) -> list[Draw]:
        """The draws of the terms, with steps that are tensors on the group's device."""
        found = []
        for term in terms:
            draw = term.draw
            if isinstance(draw.step, Tensor):
                draw = Draw(draw.step.to(self.device, non_blocking=True), draw.direction)
            found.append(draw)
        return found


def run_pass(groups: Sequence[Group], terms: Sequence[Term]) -> None:
    """Adds the terms to the weights of some groups."""
    for group in groups:
        group.apply(terms)


def run_update(groups: Sequence[Group], update: Update, applied: float = 0.0, perturb_next: float | None = None) -> None:
    """Runs the passes of an update over the weights of some groups: one, or for dense directions one for each two draws.

    Args:
        applied: scale of the perturbation along the last direction that is still in the weights; it is taken out.
        perturb_next: scale of the perturbation along direction 0 of the next step, which has the same V; None for none.
    """
    count = len(update.c)
    common = [group for group in groups if group.common] if count > 1 else []
    if common:
        run_update(common, dataclasses.replace(update, c=[_mean(update.c)]), applied, perturb_next)
        groups = [group for group in groups if not group.common]
    terms = []
    for d, c in enumerate(update.c):
        share = share_of(c, count)
        perturb = -applied if d == count - 1 else 0.0
        if update.beta is None:
            terms.append(Term(Draw(update.step, d), perturb=perturb, gradient=share * -update.lr))
        else:
            terms.append(Term(Draw(update.step, d), perturb=perturb, coefficient=(1.0 - update.beta) * share))
    decay = decay_of(update.lr, update.weight_decay)
    if perturb_next is not None:
        terms.append(Term(Draw(update.step + 1), perturb=perturb_next, decays=False))
    for group in groups:
        most = group.most_draws or len(terms)
        chunks = [terms[i : i + most] for i in range(0, len(terms), most)]
        # The first chunk decays, and the one with the last draw of this step adds the momentum product; others add their draws.
        last = (count - 1) // most
        for i, chunk in enumerate(chunks):
            carried = None
            if update.beta is not None and i <= last:
                carried = Carried(update.beta if i == 0 else 1.0, -update.lr if i == last else 0.0)
            rounding = Rounding(update.step, i) if group.rounds else None
            here = decay if i == 0 else None
            group.apply(chunk, decay=here, decayed=decay, carried=carried, rounding=rounding)


def check_update(update: Update, parameters: int) -> None:
    """Raises TypeError or ValueError unless an update is made of numbers and tensors of the right shapes. No tensor is read."""
    if not update.c:
        raise ValueError("an update needs the projected gradient of one direction at least")
    for c in update.c:
        _check_scalar("c", c, None)
    _check_scalar("lr", update.lr, parameters)
    _check_scalar("weight_decay", update.weight_decay, parameters)
    if update.beta is not None:
        _check_scalar("beta", update.beta, parameters)
    for name, factor in [("lr * c", c) for c in update.c] + [("lr * weight_decay", update.weight_decay)]:
        if not isinstance(factor, Tensor) and not isinstance(update.lr, Tensor):
            _check_scalar(name, factor * update.lr, None)


def _check_scalar(name: str, value: Any, parameters: int | None) -> None:
    """Raises TypeError or ValueError unless it is a scalar, or holds one value for each of ``parameters`` parameters."""
    if not isinstance(value, Tensor):
        if not isinstance(value, Real):
            raise TypeError(f"{name} is a number or a tensor, not {value!r:.200}")
        if LARGEST < abs(value) < math.inf:  # type: ignore[operator]
            raise ValueError(f"{name} is {value}, which is beyond fp32")
        return
    if value.is_complex() or value.layout != torch.strided or value.device.type == "meta":
        raise TypeError(f"{name} is made of real numbers in storage, not {value.dtype} {value.layout} on {value.device}")
    if value.dim() and (parameters is None or value.shape != (parameters,)):
        each = "" if parameters is None else f", or one for each of the {parameters} parameters"
        raise ValueError(f"{name} is one number{each}, not a tensor of shape {tuple(value.shape)}")


def share_of(c: Scalar, directions: int) -> Scalar:
    """A direction's share in the mean. A tensor is divided by a tensor, so that the division rounds as that of c itself."""
    if directions == 1:
        return c
    return c / torch.full_like(c, directions) if isinstance(c, Tensor) else c / directions


def _mean(c: Sequence[Scalar]) -> Scalar:
    """The mean, of shares that are added in order, so that it has the same bits everywhere."""
    total, *rest = (share_of(one, len(c)) for one in c)
    for share in rest:
        total = total + share
    return total


def decay_of(lr: Scalar, weight_decay: Scalar) -> Scalar | None:
    """The factor 1 - lr * weight_decay by which an update multiplies weights first, or None without weight decay."""
    decaying = isinstance(weight_decay, Tensor) or weight_decay != 0.0
    return 1.0 - lr * weight_decay if decaying else None
