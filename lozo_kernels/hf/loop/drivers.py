"""What the training loop drives: a zeroth-order optimiser, or a baseline with the same face."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import NonFiniteLossError
from ...model.handle import Handle
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.steps import StepSettings

Closure = Callable[[], Tensor]
"""The mean loss of a batch, 0-dim, by one forward pass that records a graph where gradients are enabled."""

MAX_NONFINITE = StepSettings.max_nonfinite
"""Steps in a row without a finite loss after which a run ends."""


class StepResult(NamedTuple):
    """What one step saw, with the names of :class:`~lozo_kernels.optim.steps.StepInfo`; ``c`` is empty for a method that has the
    gradient."""

    step: int
    loss: Tensor
    c: Tensor
    skipped: bool


class Baseline(torch.optim.Optimizer):
    """What the loop needs of :class:`~lozo_kernels.optim.ZerothOrderOptimizer`, around another optimiser. It counts its steps, and
    skips the update of one whose loss is not finite.

    Args:
        inner: its parameter groups hold the learning rate.
        handle: of the patched model, if it is patched.
    """

    handle: Any
    info: StepResult | None = None
    by_example = False
    parts_next = 1
    steps_done = 0
    _nonfinite = 0

    def __init__(self, inner: torch.optim.Optimizer, handle: Handle | None = None) -> None:
        super().__init__([torch.zeros((), dtype=torch.float32, device="cpu")], inner.defaults)
        self.inner, self.handle, self.param_groups = inner, handle, inner.param_groups

    @property
    def learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.param_groups]

    def step(self, closures: Sequence[Closure], inputs: Any = None) -> Tensor:  # type: ignore[override]
        """Evaluates closures, whose mean is the loss, and changes the weights once; returns the loss, 0-dim.

        Raises:
            NonFiniteLossError: the loss was not finite :data:`MAX_NONFINITE` times in a row.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Leaves a plain model with the trained weights: patches, adapters and changed ``requires_grad`` flags are gone."""
        if self.handle is not None:
            self.handle.restore()

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


Driver = ZerothOrderOptimizer | Baseline


def backends_of(driver: Driver) -> list[str]:
    """Names of the backends that change the weights; none where torch does."""
    return [] if driver.handle is None else sorted({p.backend for p in driver.handle.report().parameters if p.backend})
