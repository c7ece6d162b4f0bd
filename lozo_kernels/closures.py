"""What a step evaluates: closures that return a loss, or one for each example, all with the same randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Loss = Tensor | float
Closure = Callable[[], Loss]
BatchClosure = Callable[[Any], Any]
"""Takes a batch; returns one loss per example, (examples,), or (sums, weights), whose quotient of totals is the loss."""


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


def count_examples(inputs: Any) -> int:
    """The first dimension that all tensors of a batch share.

    Raises:
        ValueError: they do not, or there is none.
    """
    sizes = {x.shape[0] if x.dim() else None for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(f"the tensors of inputs have examples in their first dimension; here their sizes are {sizes or 'none'}")
    return int(next(iter(sizes)))  # type: ignore[arg-type]


def repeat_examples(inputs: Any, times: int) -> Any:
    """A batch several times over, for evaluations that share a forward pass."""
    return tree_map(lambda x: torch.cat([x] * times) if isinstance(x, Tensor) else x, inputs)


def batch_losses(closures: Sequence[BatchClosure], batches: Sequence[Any], times: int, randomness: Randomness | None) -> Tensor:
    """The loss of each of ``times`` evaluations in one call of each closure: (times,) fp64, the mean over the closures."""
    if randomness is not None:
        randomness.replay()
    losses = []
    for closure, inputs in zip(closures, batches, strict=True):
        examples = count_examples(inputs)
        losses.append(as_losses(closure(repeat_examples(inputs, times) if times > 1 else inputs), times, examples))
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def as_losses(value: Any, times: int, examples: int) -> Tensor:
    """What a closure returned for a batch as (times,) fp64; TypeError if it does not say each evaluation's loss."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    if times == 1 and len(parts) == 1 and (not isinstance(value, Tensor) or value.dim() == 0):
        return as_loss(value).reshape(1)
    if not 1 <= len(parts) <= 2 or not all(isinstance(x, Tensor) and x.shape == (times * examples,) for x in parts):
        got = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in parts)
        raise TypeError(
            f"the closure must return one loss for each of the {times * examples} examples that it was given, or their sums and "
            f"weights, so that evaluations can be told apart; it returned {got}"
        )
    sums = parts[0].detach().to(torch.float64).view(times, examples).sum(1)
    if len(parts) == 1:
        return sums / torch.full_like(sums, examples)
    return sums / parts[1].detach().to(torch.float64).view(times, examples).sum(1)


def pair_closures(closure: Any, inputs: Any) -> tuple[list[Any], list[Any] | None]:
    """Closures and, if there are inputs, a batch for each.

    Raises:
        TypeError: there is no closure.
        ValueError: another number of inputs.
    """
    single = callable(closure)
    closures = [closure] if single else list(closure or ())
    if not closures or not all(map(callable, closures)):
        raise TypeError("step() needs a closure that returns the loss (or a sequence of them): optimizer.step(lambda: loss_fn())")
    if inputs is None:
        return closures, None
    batches = [inputs] if single else list(inputs)
    if len(batches) != len(closures):
        raise ValueError(f"there are {len(batches)} inputs for {len(closures)} closures")
    return closures, batches


def bind_inputs(closures: Sequence[BatchClosure], batches: Sequence[Any]) -> list[Closure]:
    """Closures that take nothing."""

    def bound(closure: BatchClosure, inputs: Any) -> Closure:
        return lambda: as_losses(closure(inputs), 1, count_examples(inputs))[0]

    return [bound(closure, inputs) for closure, inputs in zip(closures, batches, strict=True)]
