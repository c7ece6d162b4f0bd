"""What one step saw, owes and is given."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

from torch import Tensor

from ..kernels.calls import Step


@dataclasses.dataclass(frozen=True)
class StepInfo:
    """What one step saw, as fp64 tensors that stay on the device of the loss.

    Attributes:
        step: index of the step, from 0.
        loss: 0-dim; mean of F(+) and F(-) over the directions, or F at the unperturbed weights when one-sided.
        loss_plus, loss_minus: (directions,); when one-sided, loss_minus is F at the unperturbed weights.
        c: (directions,) projected gradients; 0 when the update was skipped.
        skipped: 0-dim bool: a loss was not finite and the update was skipped.
        skipped_total, skipped_in_a_row: 0-dim integers: skipped updates so far, and those since the last that was not.
    """

    step: int
    loss: Tensor
    loss_plus: Tensor
    loss_minus: Tensor
    c: Tensor
    skipped: Tensor
    skipped_total: Tensor
    skipped_in_a_row: Tensor


@dataclasses.dataclass(frozen=True)
class Pending:
    """An update whose pass over the weights is still owed. ``step`` and ``c`` are those of the step that was probed."""

    step: Step
    c: list[Tensor]
    lr: Tensor
    weight_decay: Tensor | float
    beta: Tensor | None


@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What a step takes from tensors that are filled before it, when it is captured: fp64, on the device of the loss.

    Attributes:
        step: 0-dim int64.
        settings: "lr" and "weight_decay", 0-dim or one value per parameter.
    """

    step: Tensor
    settings: dict[str, Tensor]


class StepLog(Protocol):
    """What an optimiser tells a journal (:mod:`lozo_kernels.journal`). What it is told of may still be taken back."""

    def add_step(self, optimizer: Any, info: StepInfo) -> None:
        """A step is about to be taken; if this raises, it is not."""

    def take_back(self) -> None:
        """The step that was told last was not taken after all."""

    def add_flush(self) -> None:
        """A pending update is about to be made outside of a step, in a pass of its own."""

    def add_detour(self, moves: int) -> None:
        """Weights went through the first ``moves`` points of the present step and back."""

    def finish(self) -> None:
        """The run ends: brings the weights up to date, notes their fingerprint and closes the file."""
