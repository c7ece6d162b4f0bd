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
) -> bool:
    """Evaluates two distant points one after the other and together, and compares the losses.

    Args:
        handle: a probe that was prepared; members: those of the handle.

    Returns:
        Whether that proves something: some loss is finite and another one than at rest.

    Raises:
        BatchSplitError: together they fail, or their losses differ.
    """
    scale = typical_scale(members, handle.config.rank)
    try:
        handle.rest_()
        rest = float(batch_losses(closures, batches, 1, conditions))
        alone = []
        for side in (scale, -scale):
            handle.perturb_(step, side)
            alone.append(float(batch_losses(closures, batches, 1, conditions)))
            handle.rest_()
        handle.spread_(step, [(0, scale), (0, -scale)], count_examples(batches[0]))
        try:
            together = batch_losses(closures, batches, 2, conditions).tolist()
        except (RuntimeError, IndexError, ValueError) as error:
            if isinstance(error, BatchSplitError):
                raise
            raise BatchSplitError(
                f"two evaluations in one forward pass failed, where one by one they did not ({error}): this model gives some "
                "module inputs that are not split by example; use evaluation='sequential'"
            ) from error
    finally:
        handle.rest_()
    reshard(handle.model)
    losses = [Losses(rest, a, b) for a, b in zip(together, alone, strict=True)]
    peers = Peers(handle.parameters)
    if peers.any(not all(found.agree(handle.precision) for found in losses)):
        raise BatchSplitError(
            f"two evaluations in one forward pass gave the losses {together}, one after the other {alone}: something in the model "
            "or the closure mixes the examples of a batch; use evaluation='sequential'"
        )
    return peers.any(any(found.moved() for found in losses))
