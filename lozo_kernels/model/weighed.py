"""Closures that return (sum, weight), told from closures that return a loss and something that is no weight."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .interrupts import interruptible
from .sharding import gather


class StepClosure:
    """A closure of one step, which is called for each evaluation. Each call is an :func:`interruptible` part.

    If it returns (sum, weight), or sums and weights of examples, their quotient is the loss. A loss and an accuracy look the same,
    so the rule is: weights are counts. They are whole, not negative, the same at all evaluations of a step, and 0 only with a sum
    of 0. Anything else raises ValueError. On a GPU, where the values are not waited for, it makes the loss NaN instead, so that the
    step is skipped.
    """

    def __init__(self, closure: Callable[..., Any]) -> None:
        self._closure = closure
        self._first: Tensor | None = None

    def __call__(self, *args: Any) -> Any:
        with interruptible():
            value = self._closure(*args)
        if isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_real, value)):
            return value[0], self._checked(*map(_as_values, value))
        return value

    def _checked(self, sums: Tensor, weights: Tensor) -> Tensor:
        good = is_count(sums, weights)
        if self._first is None:
            self._first = weights
        elif self._first.shape == weights.shape:
            good = good & (weights == self._first)
        return keep_where(good, weights)


def is_count(sums: Tensor, weights: Tensor) -> Tensor:
    """Whether each weight is a count: whole, not negative, and 0 only if the sum is 0 or not finite."""
    good = (weights >= 0) & (weights == weights.floor())
    return good & ((weights > 0) | (sums == 0) | ~torch.isfinite(sums)) if sums.shape == weights.shape else good


def keep_where(good: Tensor, weights: Tensor) -> Tensor:
    """Returns the weights, NaN where they are not good. Raises ValueError if they are on the CPU."""
    if good.device.type != "cpu":
        return torch.where(good, weights, float("nan"))
    if not bool(good.all()):
        found = float(weights[~good].flatten()[0])
        raise ValueError(
            "of a closure that returns two values the quotient is minimised, a sum of losses by their number: the second is a "
            f"whole number that is the same at all evaluations of a step, and here it was {found:g}; return the "
            "loss alone, and keep other figures (accuracy) out of what the closure returns"
        )
    return weights


def _is_real(value: Any) -> bool:
    return not value.is_complex() if isinstance(value, Tensor) else isinstance(value, Real)


def _as_values(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return gather(value).detach().to(torch.float64)  # type: ignore[no-any-return]
    return torch.tensor(float(value), dtype=torch.float64, device="cpu")
