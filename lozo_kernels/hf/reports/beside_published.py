"""One step of this library, one of the published code and two bare forward passes, timed in turns on copies of the model."""

from __future__ import annotations

import copy
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...bench.published import PublishedStep
from ..loop.building import build_optimizer
from ..measure import Stopwatch, peak_memory
from ..methods import METHODS
from ..objectives import Encoded, Objective
from ..settings import Settings


@torch.no_grad()
def compare(
    model: torch.nn.Module, objective: Objective, batches: Sequence[Sequence[Encoded]], settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Times the three on the first of the batches. The model itself is only read.

    Args:
        batches: of the first steps.

    Returns:
        How many interleaved rounds were counted, the medians over them in ms, and the peak memory of published steps on all the
        batches in bytes, weights included; None where nothing counts them.
    """
    method = METHODS[settings.method]
    ours, lr = copy.deepcopy(model), method.lr if settings.lr is None else settings.lr  # of which the time of a step knows nothing
    optimizer = build_optimizer(ours, dataclasses.replace(settings, lr=lr))
    update_factor = optimizer.handle.config.update_factor if method.low_rank else 1.0
    batch = objective.collate(batches[0], device)
    # The copy is made inside the measured block: the published step replaces its tensors, and only then is their release seen.
    with peak_memory(device) as memory:
        theirs = copy.deepcopy(model)
        published = PublishedStep(
            theirs,
            low_rank=method.low_rank,
            rank=settings.rank,
            interval=settings.interval,
            lr=lr * update_factor,
            eps=settings.eps,
            momentum=settings.momentum or 0.0,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
        )
        for examples in batches:
            measured = objective.collate(examples, device)
            published.step(lambda b=measured: objective.loss(theirs, b))  # type: ignore[misc]
    candidates: dict[str, Callable[[], object]] = {
        "two_forwards_ms": lambda: [objective.loss(model, batch) for _ in range(2)],
        "step_ms": lambda: optimizer.step(lambda: objective.loss(ours, batch)),
        "published_step_ms": lambda: published.step(lambda: objective.loss(theirs, batch)),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(settings.compare_steps or 0):
        for name, run in candidates.items():
            watch = Stopwatch(device)
            watch.timed(name, run)()
            if round_index >= 3:  # the first rounds warm up caches and allocators
                times[name].append(1e3 * watch.seconds(name))
    optimizer.handle.restore()
    medians = {name: statistics.median(values) if values else float("nan") for name, values in times.items()}
    return {"rounds": len(times["step_ms"]), **medians, "published_training_peak_bytes": memory.bytes}
