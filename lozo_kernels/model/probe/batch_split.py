"""Checks that a model keeps the evaluations that share a forward pass apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...errors import BatchSplitError
from ..conditions import Conditions
from ..handle import Handle
from ..losses import BatchClosure, batch_losses, count_examples
from ..sharding import Peers, reshard
from .choosing.verify import Losses, typical_scale
from .members import Member


@torch.no_grad()
def check_batches(
    handle: Handle,
    members: Sequence[Member],
    closures: Sequence[BatchClosure],
    batches: Sequence[Any],
    conditions: Conditions,
    *,
    step: int,
    parts: int,
) -> bool:
    """Evaluates two distant points one after the other and together, and compares the losses.

    With directions per example, two parts of the batch are at them, and so are all others while one of the two is evaluated.

    Args:
        handle: a probe that was prepared; members: those of the handle.

    Returns:
        Whether that proves something: some loss is finite and another one than at rest.

    Raises:
        BatchSplitError: together they fail, or their losses differ.
    """
    apart = handle.config.per_example
    scale, advice = typical_scale(members, handle.config.rank), "use evaluation='sequential'"
    points = [(0, scale), (0, -scale)]
    if apart:
        advice, points = "GRZO cannot train it, and LOZO can", [(0, scale), (parts - 1, scale)]

    def losses_of(times: int) -> list[float]:
        return batch_losses(closures, batches, times, conditions, apart=apart).tolist()

    try:
        handle.rest_()
        rest, alone = losses_of(parts), []
        for direction, side in points:
            handle.perturb_(step, side, direction=direction)
            alone.append(losses_of(parts)[direction])
            handle.rest_()
        handle.spread_(step, points[:1] if apart else points, count_examples(batches[0]), parts)
        try:
            together = losses_of(parts if apart else 2)
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, BatchSplitError):
                raise
            raise BatchSplitError(
                f"two evaluations in one forward pass failed, where one by one they did not ({error}): this model gives some "
                f"module inputs that are not split by example; {advice}"
            ) from error
    finally:
        handle.rest_()
    reshard(handle.model)
    if apart:
        together = [together[direction] for direction, _ in points]
    losses = [Losses(rest[d], a, b) for (d, _), a, b in zip(points, together, alone, strict=True)]
    peers = Peers(handle.parameters)
    if peers.any(not all(found.agree(handle.precision) for found in losses)):
        raise BatchSplitError(
            f"two evaluations in one forward pass gave the losses {together}, one after the other {alone}: something in the model "
            f"or the closure mixes the examples of a batch; {advice}"
        )
    return peers.any(any(found.moved() for found in losses))
