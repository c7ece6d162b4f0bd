"""Whether a run can learn anything with its learning rate, and whether it does, said while there is time to stop it."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.rate_finder import step_scale

LOOKED_AT = 20
"""Steps after which a run is judged."""
_NEGLIGIBLE = 1e-3
"""Of the loss: less than that in the whole run is no learning."""
WINDOW = 50
"""Steps whose mean loss is compared with that of the steps before."""
_RISES = 3
"""Windows in a row, each with a higher mean than the one before, after which a loss is said to rise."""
_NOISE = 4.0
"""Standard errors by which the mean of the last of them is above that of the first."""


class Prospects:
    """Looks at the first steps of a run, and warns once if all of its steps together change the loss by next to nothing.

    A step moves the weights by -lr k c D along a direction in which the loss falls by c, so that it takes at most lr k c^2 off the
    loss; noise of the batch makes c larger than what is learned, never smaller.

    Args:
        scale: k, what the scaling of directions makes of a step; None if not known, or c is normalised: nothing is said.
        steps: of the whole run.
        way_out: what to do.
    """

    def __init__(self, scale: float | None, steps: int, way_out: str) -> None:
        self._scale, self._steps, self._way_out = scale, steps, way_out
        self._seen: list[tuple[float, float]] = []  # the most that a step takes off the loss, and the loss
        self._lr = 0.0

    def look(self, step: int, loss: float, c: list[float], lr: float) -> None:  # noqa: ARG002
        """Takes in a step that was not skipped, with c of each direction."""
        if self._scale is None or len(self._seen) >= LOOKED_AT:
            return
        if lr > self._lr:  # it warms up, and the steps before say nothing of the run
            self._seen.clear()
        self._lr = lr
        if lr and c:
            self._seen.append((lr * self._scale * statistics.mean(one * one for one in c), abs(loss)))
        if len(self._seen) < LOOKED_AT:
            return
        fall, loss = (statistics.mean(values) for values in zip(*self._seen, strict=True))
        fall *= self._steps
        if fall < _NEGLIGIBLE * loss:
            warnings.warn(
                f"with a learning rate of {lr:.3g}, all {self._steps} steps together change the loss of {loss:.4g} by "
                f"{fall:.2g} at most: the run will learn next to nothing. {self._way_out}",
                stacklevel=2,
            )


class Rising:
    """Looks at the losses of a run, and warns once if they rise for long.

    Args:
        option: how the user calls the learning rate.
    """

    def __init__(self, option: str) -> None:
        self._option = option
        self._losses: list[float] = []
        self._means: list[tuple[float, float]] = []  # of the windows that rose so far: mean and its variance

    def look(self, step: int, loss: float, c: list[float], lr: float) -> None:  # noqa: ARG002
        """As :meth:`Prospects.look`."""
        if len(self._means) > _RISES:
            return
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return
        mean, variance = statistics.mean(self._losses), statistics.variance(self._losses) / WINDOW
        self._losses.clear()
        if self._means and mean <= self._means[-1][0]:
            self._means.clear()
        self._means.append((mean, variance))
        first, before = self._means[0]
        if len(self._means) <= _RISES:
            return
        if mean - first <= _NOISE * math.sqrt(variance + before):
            del self._means[0]
            return
        warnings.warn(
            f"the loss rises: {first:.4g} in the mean of {WINDOW} steps, {mean:.4g} {_RISES * WINDOW} steps later (step "
            f"{step}). Begin anew with a lower {self._option} than {lr:.3g}",
            stacklevel=2,
        )


def judges_of(optimizer: Any, steps: int, option: str, way_out: str) -> list[Prospects | Rising]:
    """What looks at the steps of a run of so many; see the classes for the others."""
    scale = None
    if isinstance(optimizer, ZerothOrderOptimizer):
        handle, normalise = optimizer.handle, optimizer.stepper.settings.normalise
        scale = step_scale(handle.config) if normalise is None and not handle.estimator.carries else None
    return [Prospects(scale, steps, way_out), Rising(option)]
