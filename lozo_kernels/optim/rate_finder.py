"""A learning rate that finds itself from forward passes alone (``lr="auto"``).

Along a direction D the loss of a batch is F(X + a D) = F + a c + a^2 h / 2. An update moves by a = -k lr c, where k is what the
scaling of low-rank directions makes of it. The loss over all data then falls by k lr E[c c'] - (k lr)^2 E[c^2 h] / 2 in the mean,
where c' is the derivative of that loss. It falls most at

    lr = E[c c'] / (k E[c^2 h]).

h = (F(+) + F(-) - 2 F(0)) / eps^2 costs one forward pass. Two parts of a batch have independent noise, so that E[c c'] is the mean
product of their c. Both are measured in the first steps, which change no weight, and in one step of twelve from then on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_map

from ..model.config import PatchConfig
from ..model.handle import Handle
from ..model.losses import Closure, bind_inputs, count_examples
from .steps import StepSettings

WARM_UP = 8
"""Steps at the start that only measure."""
EVERY = 12
"""Of so many steps one measures, later on."""
_KEPT = 24
"""Measurements from which the curvature is averaged."""
_MEMORY = 0.98
"""The factor by which each measurement makes earlier ones count less in the share of the gradient."""
_CAUTION = 0.2
"""The part of the rate at which the loss falls most in one step. Over many steps a smaller rate falls further, and noise of a
direction that adds up to much curvature is rare, so that averages see it late."""
_LEAST_SHARE = 0.2
_LARGEST_FALL = 0.01
"""Of the loss, in one step."""


AUTO = "auto"


def measures(step: int) -> bool:
    """Whether a step measures in a run whose losses are all finite."""
    return step < WARM_UP or step % EVERY == 0


class Measured(NamedTuple):
    """What one direction of a step showed.

    Attributes:
        loss: F(0).
        square: c^2.
        product: the mean product of c over pairs of parts of the batch.
        curvature: h.
    """

    loss: float
    square: float
    product: float
    curvature: float


class RateFinder:
    """Finds the learning rate of a run.

    Args:
        scale: k; directions: of a step.
    """

    def __init__(self, scale: float, directions: int) -> None:
        self._scale, self._directions = scale, directions
        self._recent: list[Measured] = []
        self._square = self._product = 0.0
        self._steps = 0

    def due(self, step: int) -> bool:
        """Whether a step is to be measured."""
        return self._steps < WARM_UP or step % EVERY == 0

    def add(self, measured: Sequence[Measured]) -> None:
        """Adds what the directions of a measured step showed. What is not finite counts for nothing."""
        good = [row for row in measured if all(map(math.isfinite, row))]
        self._steps += bool(good)
        for row in good:
            self._square = _MEMORY * self._square + row.square
            self._product = _MEMORY * self._product + row.product
        self._recent = [*self._recent, *good][-_KEPT * self._directions :]

    def state(self) -> dict[str, Any]:
        """What a run needs to go on."""
        return {"steps": self._steps, "square": self._square, "product": self._product, "recent": [list(r) for r in self._recent]}

    def load(self, state: Any) -> None:
        """Loads :meth:`state`. Raises ValueError if it is none; nothing was changed."""
        try:
            recent = [Measured(*map(float, row)) for row in state["recent"]]
            steps, square, product = int(state["steps"]), float(state["square"]), float(state["product"])
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"this is no state of lr='auto': {state!r:.200}") from None
        self._steps, self._square, self._product, self._recent = steps, square, product, recent

    @property
    def rate(self) -> float:
        """The learning rate now; 0.0 during the first measurements, and as long as no loss varied.

        Directions of a step are averaged. They are almost orthogonal, so that a step could be as many times larger; its square root
        is what is best over many steps.
        """
        if self._steps < WARM_UP or not self._square:
            return 0.0
        square = _mean([row.square for row in self._recent])
        bends = [row.square * row.curvature for row in self._recent]
        # Where the curvature is not above its own noise, the noise says how large it may be.
        bend = max(_mean(bends), _error(bends))
        share = min(1.0, max(_LEAST_SHARE, self._product / self._square))
        gain = share * square
        if not gain:
            return 0.0
        loss = abs(_mean([row.loss for row in self._recent]))
        bounds = [_LARGEST_FALL * loss / gain] if loss else []
        bounds += [_CAUTION * gain / bend] if bend else []
        return math.sqrt(self._directions) * min(bounds) / self._scale if bounds else 0.0


def make_finder(handle: Handle, settings: StepSettings) -> RateFinder:
    """Makes the finder of a run with ``lr="auto"``. Raises ValueError if the run cannot be measured."""
    if handle.backward is not None:
        raise ValueError("lr='auto': drive='backward' evaluates a loss that is not given in parts; give a number")
    if handle.config.per_example:
        raise ValueError("lr='auto' is not for directions per example (GRZO): leave it out, or use LOZO")
    if handle.estimator.carries:
        raise ValueError("lr='auto' is a rate for updates of c D, and those of ZO-Muon have one length: give a number, e.g. 1e-2")
    if settings.normalise is not None:
        raise ValueError("lr='auto' is a rate for c as it is: leave normalise out, or give a number")
    return RateFinder(step_scale(handle.config), settings.directions)


def step_scale(config: PatchConfig) -> float:
    """k: an update moves weights by -k lr c along a direction that evaluations move them by eps along."""
    return 1.0 if config.estimator == "dense" else config.update_factor / config.perturb_factor


def in_parts(closures: Sequence[Any], batches: Sequence[Any] | None, *, of_ranks: bool) -> list[Closure]:
    """Returns closures of the parts of a batch: the closures, if there are several; otherwise of both halves of the inputs.
    Raises TypeError if there are no parts.

    Args:
        of_ranks: processes have a part each, so that nothing is cut.
    """
    if batches is None:
        if len(closures) > 1 or of_ranks:
            return list(closures)
        raise TypeError(
            "lr='auto' tells the gradient from the noise of a batch by its parts: call step(closure, inputs), or give several "
            "closures (micro-batches)"
        )
    if len(closures) > 1 or of_ranks:
        return bind_inputs(closures, batches)
    count = count_examples(batches[0])
    if count < 2:
        raise ValueError("lr='auto' needs batches of two examples or more")
    halves = [slice(0, count // 2), slice(count // 2, count)]
    parts = [tree_map(lambda x, some=some: x[some] if isinstance(x, Tensor) else x, batches[0]) for some in halves]
    return bind_inputs([*closures, *closures], parts)


def measure(rest: Tensor, plus: Tensor, minus: Tensor, *, eps: float) -> Measured:
    """What a direction showed.

    Args:
        rest, plus, minus: losses of the parts of a batch, (parts,), at the weights and at both points of the direction.
    """
    c = ((plus - minus) / (2 * eps)).tolist()
    n = len(c)
    mean = sum(c) / n
    product = (sum(c) ** 2 - sum(x * x for x in c)) / (n * (n - 1))
    bend = float((plus + minus - 2 * rest).mean()) / eps**2
    return Measured(float(rest.mean()), mean * mean, product, bend)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean."""
    mean, n = _mean(values), len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, n - 1) / n)
