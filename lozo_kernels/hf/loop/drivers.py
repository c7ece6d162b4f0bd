"""What the training loop drives: one protocol for every method, and the zeroth-order optimisers behind it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ...errors import NonFiniteLossError
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.steps import StepInfo

Closure = Callable[[], Tensor]
"""The mean loss of a batch, 0-dim, by one forward pass that records a graph where gradients are enabled."""

MAX_NONFINITE = 10
"""Steps in a row without a finite loss after which a run ends, as in :class:`~lozo_kernels.optim.ZerothOrderOptimizer`."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step saw, with the names of :class:`~lozo_kernels.optim.steps.StepInfo`.

    Attributes:
        step: index of the step, from 0.
        loss: the loss, 0-dim.
        c: directional derivatives along the directions of the step, (directions,); empty for a method that has the gradient.
        skipped: whether the loss was not finite, so that the weights were left alone.
    """

    step: int
    loss: Tensor
    c: Tensor
    skipped: bool = False


class Driver(Protocol):
    """One way of training, as the loop sees it.

    Attributes:
        backends: names of the kernels that change the weights; empty where torch does.
    """

    backends: list[str]

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser whose parameter groups hold the learning rate, for a schedule to change."""

    @property
    def info(self) -> StepInfo | StepResult | None:
        """What the last step saw; None before the first step."""

    @property
    def steps_done(self) -> int:
        """Steps taken so far."""

    def step(self, closure: Closure) -> Tensor:
        """Evaluates the closure and changes the weights once; returns the loss, 0-dim.

        Raises:
            NonFiniteLossError: the loss was not finite :data:`MAX_NONFINITE` times in a row.
        """

    def close(self) -> None:
        """Leaves a plain model with the trained weights: patches, adapters and changed ``requires_grad`` flags are gone."""


class ZerothOrder:
    """A :class:`~lozo_kernels.optim.optimizer.ZerothOrderOptimizer` as a driver."""

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer
        self.backends: list[str] = sorted({p.backend for p in optimizer.handle.report().parameters if p.backend})

    @property
    def info(self) -> StepInfo | None:
        return self.optimizer.info

    @property
    def steps_done(self) -> int:
        return self.optimizer.steps_done

    def step(self, closure: Closure) -> Tensor:
        return self.optimizer.step(closure)

    def close(self) -> None:
        try:
            if self.optimizer.journal is not None:
                self.optimizer.journal.finish()
        finally:
            self.optimizer.handle.restore()


class LossWatch:
    """Counts the losses in a row that were not finite."""

    def __init__(self) -> None:
        self._in_a_row = 0

    def finite(self, loss: Tensor, step: int) -> bool:
        """Whether the loss is finite, so that the step may go on. It reads the loss, so it waits for the device.

        Raises:
            NonFiniteLossError: this is loss number :data:`MAX_NONFINITE` in a row that is not finite.
        """
        if bool(torch.isfinite(loss)):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        if self._in_a_row < MAX_NONFINITE:
            warnings.warn(f"step {step}: the loss was not finite; update skipped", stacklevel=4)
            return False
        raise NonFiniteLossError(
            f"the loss was not finite {self._in_a_row} steps in a row (last: {float(loss)} at step {step}); "
            "the weights are those of the last good step. Lower lr, or look for overflow in half precision"
        )
