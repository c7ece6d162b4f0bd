"""The settings of steps, what a step saw, and what a journal is told of it."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from ..kernels.checks import as_integer, check_flag, check_number
from .normalise import NORMALISE

EVALUATIONS = ("sequential", "batched", "split")
BY_EXAMPLE = ("batched", "split")
"""The evaluations that need the loss of each example."""


@dataclasses.dataclass
class StepSettings:
    """The settings of a run's steps; :class:`~lozo_kernels.optim.ZerothOrderOptimizer` documents each. Raises TypeError or
    ValueError if one is of the wrong type or out of range."""

    eps: float = 1e-3
    momentum: float = 0.0
    directions: int = 1
    two_sided: bool = True
    fuse_steps: bool = False
    evaluation: str = "sequential"
    common_random_numbers: bool = True
    max_nonfinite: int = 10
    normalise: str | None = None

    def __post_init__(self) -> None:
        check_number("eps", self.eps, low=0.0, open_low=True)
        check_number("momentum", self.momentum, low=0.0, high=1.0)
        for name in ("directions", "max_nonfinite"):
            setattr(self, name, as_integer(name, getattr(self, name), 1))
        for name in ("two_sided", "fuse_steps", "common_random_numbers"):
            check_flag(name, getattr(self, name))
        if self.evaluation not in EVALUATIONS:
            raise ValueError(f"evaluation is one of {', '.join(map(repr, EVALUATIONS))}, not {self.evaluation!r}")
        if self.normalise not in (None, *NORMALISE):
            raise ValueError(f"normalise is one of {', '.join(map(repr, NORMALISE))} or None, not {self.normalise!r}")
        if self.normalise == "spread" and self.directions < 2:
            raise ValueError("normalise='spread' is the spread of c over the directions of a step: give directions=2 or more")
        if self.evaluation == "split" and self.directions < 2:
            raise ValueError("evaluation='split' gives each direction a part of the batch: give directions=2 or more")
        if self.evaluation == "split" and not self.two_sided:
            raise ValueError("evaluation='split' makes two forward passes on one side or two: leave two_sided=False out")

    @property
    def by_example(self) -> bool:
        """Whether evaluations need the loss of each example."""
        return self.evaluation in BY_EXAMPLE

    @property
    def of_run(self) -> dict[str, Any]:
        """The settings that stay the same for a whole run, because its weights follow from them."""
        names = ("eps", "momentum", "directions", "two_sided", "fuse_steps", "evaluation")
        found = {name: getattr(self, name) for name in names}
        return found if self.normalise is None else found | {"normalise": self.normalise}


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What one step saw, as fp64 tensors that stay on the device of the loss.

    Attributes:
        step: index of the step, from 0.
        loss: 0-dim; mean of F(+) and F(-) over the directions, or F at the unperturbed weights when one-sided.
        loss_plus, loss_minus: (directions,); when one-sided, loss_minus is F at the unperturbed weights.
        c: (directions,) projected gradients; 0 when the update was skipped.
        skipped: 0-dim bool: a loss was not finite and the update was skipped.
        skipped_total, skipped_in_a_row: 0-dim integers: skipped updates so far, and those since the last that was made.
        moment: (2,), the running mean of c^2 and its weight of ``normalise="scalar"``; zeros without.
        flat: 0-dim integer: by how many the recent steps in which F(+) and F(-) were equal in every bit outnumber the others.
    """

    step: int
    loss: Tensor
    loss_plus: Tensor
    loss_minus: Tensor
    c: Tensor
    skipped: Tensor
    skipped_total: Tensor
    skipped_in_a_row: Tensor
    flat: Tensor
    moment: Tensor


@dataclasses.dataclass(frozen=True)
class Rates:
    """Learning rate and weight decay of a step, fp64: 0-dim, or one value per parameter. The decay is 0.0 if nothing decays."""

    lr: Tensor
    weight_decay: Tensor | float


class StepLog(Protocol):
    """What a stepper tells a journal (:mod:`lozo_kernels.journal`)."""

    def add_step(self, info: StepInfo) -> None:
        """A step is about to be taken. If this raises, it is not taken."""

    def take_back(self) -> None:
        """The last step that was added was not taken after all."""

    def add_flush(self) -> None:
        """A pending update is about to be made outside of a step, in a pass of its own."""

    def add_detour(self, moves: int, *, measuring: bool) -> None:
        """Weights went through the first ``moves`` points of the current step and back, which measures for ``lr="auto"`` or not."""

    def finish(self) -> None:
        """The run ends: merges what was learned, records the weights' fingerprint and closes the file."""
