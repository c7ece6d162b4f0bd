"""What the training loop drives: one protocol for every method, and the zeroth-order optimisers behind it."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import NonFiniteLossError
from ...model.handle import Handle
from ...model.losses import BatchClosure
from ...optim.measuring import has_parts
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.rate_finder import step_scale
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

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""

    @property
    def scale(self) -> float | None:
        """What the scaling of directions makes of a step along them; None where there are none."""

    @property
    def parts(self) -> int:
        """The number of closures that the next step needs: parts of its batch, whose mean is the loss."""

    def step(self, closure: Any) -> Tensor:
        """Evaluates the closure, or several whose mean is the loss, and changes the weights once; returns the loss, 0-dim.

        Raises:
            NonFiniteLossError: the loss was not finite :data:`MAX_NONFINITE` times in a row.
        """

    def close(self) -> None:
        """Leaves a plain model with the trained weights: patches, adapters and changed ``requires_grad`` flags are gone."""


def backends_of(handle: Handle) -> list[str]:
    """Names of the backends that change the weights of a patched model."""
    return sorted({p.backend for p in handle.report().parameters if p.backend})


class ZerothOrder:
    """A :class:`~lozo_kernels.optim.optimizer.ZerothOrderOptimizer` as a driver."""

    def __init__(self, optimizer: ZerothOrderOptimizer) -> None:
        self.optimizer = optimizer
        self.backends = backends_of(optimizer.handle)

    @property
    def info(self) -> StepInfo | None:
        return self.optimizer.info

    @property
    def steps_done(self) -> int:
        return self.optimizer.steps_done

    @property
    def lr(self) -> float:
        return float(self.optimizer.learning_rates[0])

    @property
    def scale(self) -> float | None:
        handle = self.optimizer.handle
        plain = self.optimizer.stepper.settings.normalise is None and not handle.estimator.carries
        return step_scale(handle.config) if plain else None

    @property
    def parts(self) -> int:
        return 2 if self.optimizer.measures_next and not has_parts(self.optimizer.parallel) else 1

    @property
    def batched(self) -> bool:
        """Whether a step needs the loss of each example (:meth:`step_together`): evaluations share a forward pass, or examples have
        directions of their own."""
        return self.optimizer.stepper.settings.by_example or self.optimizer.handle.config.per_example

    def step(self, closure: Any) -> Tensor:
        return self.optimizer.step(closure)

    def step_together(self, closures: Sequence[BatchClosure], examples: Sequence[int]) -> Tensor:
        """A step whose closures are given indices of the examples of their batches, each once for every evaluation."""
        inputs = [torch.arange(count, dtype=torch.int64, device="cpu") for count in examples]
        return self.optimizer.step(closures, inputs) if len(inputs) > 1 else self.optimizer.step(closures[0], inputs[0])

    def close(self) -> None:
        try:
            if self.optimizer.journal is not None:
                self.optimizer.journal.finish()
        finally:
            self.optimizer.handle.restore()


class CountingDriver:
    """What the other drivers share: they count their steps, and skip the update of one whose loss is not finite.

    Args:
        optimizer: its parameter groups hold the learning rate.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.backends: list[str] = []
        self.info: StepResult | None = None
        self.steps_done = 0
        self._nonfinite = 0

    parts = 1
    scale: float | None = None

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

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
