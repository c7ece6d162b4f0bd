"""What the training loop drives: one class for every method, and the zeroth-order optimisers behind it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import NonFiniteLossError
from ...model.handle import Handle
from ...optim.measuring import has_parts
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.steps import StepInfo
from ..trainer.prospects import scale_of

Closure = Callable[[], Tensor]
"""The mean loss of a batch, 0-dim, by one forward pass that records a graph where gradients are enabled."""

MAX_NONFINITE = 10
"""Steps in a row without a finite loss after which a run ends, as in :class:`~lozo_kernels.optim.ZerothOrderOptimizer`."""


class StepResult(NamedTuple):
    """What one step saw, with the names of :class:`~lozo_kernels.optim.steps.StepInfo`; ``c`` is empty for a method that has the
    gradient."""

    step: int
    loss: Tensor
    c: Tensor
    skipped: bool


class Driver:
    """One way of training, as the loop sees it.

    Args:
        optimizer: its parameter groups hold the learning rate, for a schedule to change.
        handle: of the patched model, if it is patched.

    Attributes:
        backends: names of the backends that change the weights; empty where torch does.
        scale: what the scaling of directions makes of a step along them; None where there are none.
        by_example: a step needs the loss of each example: evaluations share a forward pass, or examples have directions of their
            own.
        parts: the number of closures that the next step needs: parts of its batch, whose mean is the loss.
        info: what the last step saw; None before the first step.
        steps_done: steps taken so far.
        lr: the learning rate of the next step.
    """

    info: StepInfo | StepResult | None = None
    scale: float | None = None
    by_example = False
    parts = 1
    steps_done = 0

    def __init__(self, optimizer: torch.optim.Optimizer, handle: Handle | None = None) -> None:
        self.optimizer = optimizer
        self.backends = sorted({p.backend for p in handle.report().parameters if p.backend}) if handle is not None else []

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def step(self, closures: Sequence[Callable[..., Any]], inputs: Sequence[Tensor] | None = None) -> Tensor:
        """Evaluates closures, whose mean is the loss, and changes the weights once; returns the loss, 0-dim.

        Args:
            inputs: for each closure the indices of its examples, where the loss of each is needed: it gets them once for every
                evaluation.

        Raises:
            NonFiniteLossError: the loss was not finite :data:`MAX_NONFINITE` times in a row.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Leaves a plain model with the trained weights: patches, adapters and changed ``requires_grad`` flags are gone."""


class ZerothOrder(Driver):
    """A :class:`~lozo_kernels.optim.optimizer.ZerothOrderOptimizer` as a driver."""

    optimizer: ZerothOrderOptimizer

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        handle = optimizer.handle
        super().__init__(optimizer, handle)
        self.scale = scale_of(optimizer)
        self.by_example = optimizer.stepper.settings.by_example or handle.config.per_example

    @property
    def info(self) -> StepInfo | None:  # type: ignore[override]
        return self.optimizer.info

    @property
    def steps_done(self) -> int:  # type: ignore[override]
        return self.optimizer.steps_done

    @property
    def lr(self) -> float:
        return float(self.optimizer.learning_rates[0])

    @property
    def parts(self) -> int:  # type: ignore[override]
        return 2 if self.optimizer.measures_next and not has_parts(self.optimizer.parallel) else 1

    def step(self, closures: Sequence[Callable[..., Any]], inputs: Sequence[Tensor] | None = None) -> Tensor:
        return self.optimizer.step(closures, inputs)

    def close(self) -> None:
        try:
            if self.optimizer.journal is not None:
                self.optimizer.journal.finish()
        finally:
            self.optimizer.handle.restore()


class CountingDriver(Driver):
    """What the other drivers share: they count their steps, and skip the update of one whose loss is not finite."""

    _nonfinite = 0

    def finish_step(self, loss: Tensor, c: Tensor, update: Callable[[], object]) -> Tensor:
        """Makes an update, records the step and returns its loss. It reads the loss, so it waits for the device.

        Args:
            loss, c: as in :class:`StepResult`; where one of them is not finite there is no update.

        Raises:
            NonFiniteLossError: this is step number :data:`MAX_NONFINITE` in a row without an update.
        """
        good = bool(torch.isfinite(loss + c.sum()))
        self._nonfinite = 0 if good else self._nonfinite + 1
        try:
            if good:
                update()
        finally:
            step, self.steps_done = self.steps_done, self.steps_done + 1
            self.info = StepResult(step, loss, c, skipped=not good)
        if self._nonfinite >= MAX_NONFINITE:
            raise NonFiniteLossError(
                f"the loss was not finite {self._nonfinite} steps in a row (last: {float(loss)} at step {step}); "
                "the weights are those of the last good step. Lower lr, or look for overflow in half precision"
            )
        if not good:
            warnings.warn(f"step {step}: the loss was not finite; update skipped", stacklevel=3)
        return loss
