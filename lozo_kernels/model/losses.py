"""What a step evaluates: closures that return a loss, or a loss for each example, all with the same random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .conditions import Conditions
from .sharding import gather
from .weighed import keep_where

Loss = Tensor | float
Closure = Callable[[], Loss]
BatchClosure = Callable[[Any], Any]
"""Takes a batch and returns a loss per example, (examples,), or (sums, weights), where the loss is total sum / total weight."""


def mean_loss(closures: Sequence[Closure], conditions: Conditions) -> Tensor:
    """Returns the mean loss of the closures, evaluated under the given conditions, as a 0-dim fp64 tensor."""
    conditions.begin_evaluation()
    losses = [as_loss(closure()) for closure in closures]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def part_losses(closures: Sequence[Closure], conditions: Conditions) -> Tensor:
    """As :func:`mean_loss`, but returns the loss of each closure, (closures,) fp64. Their mean is the mean loss, in every bit."""
    conditions.begin_evaluation()
    return torch.stack([as_loss(closure()) for closure in closures])


def as_loss(value: Any) -> Tensor:
    """Returns a closure's result as a 0-dim fp64 tensor on its device; TypeError unless it is one real number, or (sum, weight)."""
    if isinstance(value, tuple) and len(value) == 2:
        total, weight = map(as_loss, value)
        return total / weight.to(total.device)
    if isinstance(value, Tensor):
        value = gather(value)
        if value.numel() != 1 or value.is_complex():
            raise TypeError(
                f"the closure must return one real number; it returned a tensor of shape {tuple(value.shape)}, {value.dtype}"
            )
        return value.detach().reshape(()).to(torch.float64)
    try:
        return torch.tensor(float(value), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        raise TypeError(f"the closure must return the loss, a tensor or a number; it returned {type(value).__name__}") from None


def mean_totals(closures: Sequence[Closure], conditions: Conditions) -> Tensor:
    """As :func:`mean_loss`, but returns (sum, weight) for a mean over processes: (2,) fp64, on the device of the losses.

    A closure that returns a mean has the number of its examples as its weight, or 1 if that is not known.
    """
    conditions.begin_evaluation()
    found = [closure.totals() if isinstance(closure, BoundClosure) else _totals(closure(), 1) for closure in closures]
    if len(found) == 1:
        return found[0]
    sums, weights = torch.stack(found).unbind(1)
    return torch.stack(((sums / weights).mean() * weights.sum(), weights.sum()))


def _totals(value: Any, weight: int) -> Tensor:
    if isinstance(value, tuple) and len(value) == 2:
        total = as_loss(value[0])
        return torch.stack((total, as_loss(value[1]).to(total.device)))
    loss = as_loss(value)
    return torch.stack((loss * weight, torch.full_like(loss, weight)))


def count_examples(inputs: Any) -> int:
    """Returns the size of the first dimension, which all tensors of a batch share. Raises ValueError if they do not, or there
    are none."""
    sizes = {x.shape[0] if x.dim() else None for x in tree_leaves(inputs) if isinstance(x, Tensor)}
    if len(sizes) != 1 or None in sizes or 0 in sizes:
        raise ValueError(f"the tensors of inputs have examples in their first dimension; here their sizes are {sizes or 'none'}")
    return int(next(iter(sizes)))  # type: ignore[arg-type]


def repeat_examples(inputs: Any, times: int) -> Any:
    """Repeats a batch along its first dimension, for evaluations that share a forward pass."""
    return tree_map(lambda x: torch.cat([x] * times) if isinstance(x, Tensor) else x, inputs)


def batch_losses(
    closures: Sequence[BatchClosure], batches: Sequence[Any], times: int, conditions: Conditions, *, apart: bool = False
) -> Tensor:
    """Makes ``times`` evaluations in one call of each closure. Returns their losses, (times,) fp64, as means over the closures.

    Args:
        apart: the evaluations are of equal parts of a batch, not of copies of it. The mean of their losses is that of the batch.
    """
    losses = [sums / weights for sums, weights in _batch_totals(closures, batches, times, conditions, apart)]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean(0)


def batch_totals(
    closures: Sequence[BatchClosure], batches: Sequence[Any], times: int, conditions: Conditions, *, apart: bool = False
) -> Tensor:
    """As :func:`batch_losses`, but returns (sum, weight) for a mean over processes: (times, 2) fp64."""
    found = _batch_totals(closures, batches, times, conditions, apart)
    if len(found) == 1:
        return torch.stack(found[0], 1)
    weight = torch.stack([weights for _, weights in found]).sum(0)
    return torch.stack((torch.stack([sums / weights for sums, weights in found]).mean(0) * weight, weight), 1)


def _batch_totals(
    closures: Sequence[BatchClosure], batches: Sequence[Any], times: int, conditions: Conditions, apart: bool
) -> list[tuple[Tensor, Tensor]]:
    conditions.begin_evaluation()
    found = []
    for closure, inputs in zip(closures, batches, strict=True):
        if apart:
            found.append(_part_totals(closure(inputs), times, count_examples(inputs)))
            continue
        examples = count_examples(inputs)
        found.append(_as_totals(closure(repeat_examples(inputs, times) if times > 1 else inputs), times, examples))
    return found


def _part_totals(value: Any, parts: int, examples: int) -> tuple[Tensor, Tensor]:
    """Returns the sum of each part's losses as so many parts of a batch's, and the weight of the whole batch for each."""
    sums, weights = _as_totals(value, parts, examples // parts, alike=False)
    return sums * parts, weights.sum().expand(parts)


def as_losses(value: Any, times: int, examples: int) -> Tensor:
    """Returns a closure's result for a batch as (times,) fp64; TypeError if it does not tell the evaluations apart."""
    sums, weights = _as_totals(value, times, examples)
    return sums / weights


def _as_totals(value: Any, times: int, examples: int, *, alike: bool = True) -> tuple[Tensor, Tensor]:
    """Returns sums and weights, (times,) fp64 each. A mean is a sum of weight 1. ``alike``: weights are the same every time."""
    parts = [gather(x) if isinstance(x, Tensor) else x for x in (value if isinstance(value, (tuple, list)) else (value,))]
    if times == 1 and len(parts) == 1 and (not isinstance(value, Tensor) or value.dim() == 0):
        loss = as_loss(value).reshape(1)
        return loss, torch.ones_like(loss)
    if not 1 <= len(parts) <= 2 or not all(isinstance(x, Tensor) and x.shape == (times * examples,) for x in parts):
        got = ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in parts)
        raise TypeError(
            f"the closure must return one loss for each of the {times * examples} examples that it was given, or their sums and "
            f"weights, so that evaluations can be told apart; it returned {got}"
        )
    sums = parts[0].detach().to(torch.float64).view(times, examples).sum(1)
    if len(parts) == 1:
        return sums, torch.full_like(sums, examples)
    weights = parts[1].detach().to(torch.float64).view(times, examples)
    return sums, (keep_where(weights == weights[:1], weights) if alike else weights).sum(1)


def pair_closures(closure: Any, inputs: Any) -> tuple[list[Any], list[Any] | None]:
    """Returns the closures as a list and, if there are inputs, a batch for each.
    Raises TypeError if there is no closure, ValueError if there is another number of inputs."""
    single = callable(closure)
    closures = [closure] if single else list(closure) if isinstance(closure, Iterable) else []
    if not closures or not all(map(callable, closures)):
        raise TypeError(
            "step() needs a closure that returns the loss (or a sequence of them): optimizer.step(lambda: loss_fn()); in a loop "
            "that calls loss.backward(), build the optimiser with drive='backward'"
        )
    if inputs is None:
        return closures, None
    batches = [inputs] if single else list(inputs)
    if len(batches) != len(closures):
        raise ValueError(f"there are {len(batches)} inputs for {len(closures)} closures")
    return closures, batches


def bind_inputs(closures: Sequence[BatchClosure], batches: Sequence[Any], parts: int = 1) -> list[Closure]:
    """Binds each closure to its batch, which makes closures without arguments. With ``parts`` they have to return losses of
    examples."""
    return [BoundClosure(closure, inputs, parts) for closure, inputs in zip(closures, batches, strict=True)]


class BoundClosure:
    """A closure bound to its inputs."""

    def __init__(self, closure: BatchClosure, inputs: Any, parts: int = 1) -> None:
        self._closure, self._inputs, self._parts = closure, inputs, parts

    def __call__(self) -> Tensor:
        """Returns the loss, 0-dim fp64."""
        if self._parts > 1:
            sums, weights = _part_totals(self._closure(self._inputs), self._parts, count_examples(self._inputs))
            return sums.mean() / weights[0]
        return as_losses(self._closure(self._inputs), 1, count_examples(self._inputs))[0]

    def totals(self) -> Tensor:
        """Returns the sum of the losses and their weight, (2,) fp64."""
        value, examples = self._closure(self._inputs), count_examples(self._inputs)
        if (isinstance(value, Tensor) and value.dim() == 0) or not isinstance(value, (Tensor, tuple, list)):
            return _totals(value, examples)
        return torch.cat(_as_totals(value, 1, examples))
