"""What is said to a loop that was written for back-propagation and gives it to an optimiser that needs none."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

IN_A_CLOSURE = (
    "the closure calls backward(), and no graph is recorded while it runs: let it return the loss and nothing else; where a loop "
    "gives the closure (Lightning's automatic optimisation), build the optimiser with drive='backward'; a loss that contains "
    "derivatives takes them under torch.enable_grad()"
)
DRIVEN = (
    "the loss that the closure backpropagates does not come from the driven model: call the module that was given to patch(), in "
    "train mode, and backpropagate the loss that it returns; a loss that is computed outside of it needs step(closure)"
)


def explain(error: BaseException, advice: str) -> None:
    """Raises RuntimeError with the advice if the error is torch's, of a loss that has no graph."""
    if isinstance(error, RuntimeError) and "does not require grad" in str(error):
        raise RuntimeError(advice) from error


class FirstStep:
    """Warns after the first step of an optimiser if its closure has back-propagated, which works and is for nothing."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = parameters
        self._before = self._gradients()

    def check(self) -> None:
        if self._gradients() > self._before:
            warnings.warn(
                "the closure calls backward() with gradients enabled: the step is right, but it pays time and memory for gradients "
                "that nothing uses; let the closure return the loss and nothing else, or, where a loop gives the closure "
                "(Lightning), build the optimiser with drive='backward'",
                stacklevel=4,
            )

    def _gradients(self) -> int:
        return sum(p.grad is not None for p in self._parameters)
