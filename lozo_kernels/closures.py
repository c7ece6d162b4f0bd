"""What a step evaluates: closures that return a loss, all with the same randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Loss = Tensor | float
Closure = Callable[[], Loss]


class Randomness:
    """The state of torch's generators when made; ``replay`` puts it back, so that evaluations draw the same numbers."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._cpu = torch.get_rng_state()
        self._cuda = {d: torch.cuda.get_rng_state(d) for d in devices if d.type == "cuda"}

    def replay(self) -> None:
        """Puts the state back."""
        torch.set_rng_state(self._cpu)
        for device, state in self._cuda.items():
            torch.cuda.set_rng_state(state, device)


def mean_loss(closures: Sequence[Closure], randomness: Randomness | None) -> Tensor:
    """The mean of the closures, evaluated with the given randomness, as a 0-dim fp64 tensor."""
    if randomness is not None:
        randomness.replay()
    losses = [as_loss(closure()) for closure in closures]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def as_loss(value: Any) -> Tensor:
    """What a closure returned as a 0-dim fp64 tensor on its device; TypeError if it is not one real number."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"the closure must return one real number; it returned a tensor of shape {tuple(value.shape)}, {value.dtype}"
            )
        return value.detach().reshape(()).to(torch.float64)
    try:
        return torch.tensor(float(value), dtype=torch.float64)
    except (TypeError, ValueError):
        raise TypeError(f"the closure must return the loss, a tensor or a number; it returned {type(value).__name__}") from None
