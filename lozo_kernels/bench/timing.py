"""Interleaved timing: every contender is called in every round, so that noise of the machine hits all of them alike."""

from __future__ import annotations

import dataclasses
import gc
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .clock import Clock, HostClock


def quantile(values: Iterable[float], q: float) -> float:
    """Returns the q-quantile, interpolated between neighbours.

    Raises:
        ValueError: no values, or q outside 0 to 1.
    """
    ordered = sorted(values)
    if not ordered or not 0.0 <= q <= 1.0:
        raise ValueError(f"a quantile of 0 to 1 of at least one value is needed, not {q} of {len(ordered)}")
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def median(values: Iterable[float]) -> float:
    """Returns the middle value, or the mean of the two middle ones."""
    return quantile(values, 0.5)


@dataclasses.dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        call: makes one pass.
        rounds: how many rounds it joins, spread evenly over all; None for all.
        warm_up: whether it is called once before the first round.
    """

    call: Callable[[], object]
    rounds: int | None = None
    warm_up: bool = True


Seconds = dict[int, float]
"""What a contender took, by round."""


def paired_ratio(numerator: Seconds, denominator: Seconds) -> float:
    """Returns the median of the ratios within a round, which rounds in which the machine is busy do not change."""
    return median([s / denominator[i] for i, s in numerator.items() if i in denominator])


def interleave(contenders: Mapping[str, Contender], rounds: int, *, clock: Clock | None = None) -> dict[str, Seconds]:
    """Times every call, by contender and round, in seconds.

    A round calls each contender once, in an order that is shuffled anew (from a fixed seed), so that none always follows the
    same neighbour. The clock is read after a round, so that nothing waits for a device within one.

    Args:
        rounds: number of rounds.
        clock: default: the host's.
    """
    clock = clock or HostClock()
    seconds: dict[str, Seconds] = {name: {} for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for contender in contenders.values():
        if contender.warm_up:
            contender.call()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            shuffle(order)
            marks: dict[str, tuple[Any, Any]] = {}
            for name in order:
                contender = contenders[name]
                joins = rounds if contender.rounds is None else min(contender.rounds, rounds)
                if (i + 1) * joins // rounds == i * joins // rounds:
                    continue
                clock.prepare()
                start = clock.mark()
                contender.call()
                marks[name] = (start, clock.mark())
            clock.wait()
            for name, (start, end) in marks.items():
                seconds[name][i] = clock.seconds(start, end)
    finally:
        if collecting:
            gc.enable()
    return seconds


def spread(seconds: Seconds) -> dict[str, float]:
    """Returns count and quantiles for a result file."""
    return {"count": len(seconds)} | {
        name: float(f"{quantile(seconds.values(), q):.4g}")
        for name, q in (("min", 0.0), ("q25", 0.25), ("median", 0.5), ("q75", 0.75))
    }
