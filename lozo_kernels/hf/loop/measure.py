"""Time of a step and of the forward passes in it, and peak memory of a block."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def since(start: float) -> float:
    """Seconds since a value of ``time.perf_counter()``; 0 if the clock was set back."""
    return max(0.0, time.perf_counter() - start)


class Clock:
    """Marks and the time between them: on CUDA events on the stream, so that marking waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> Any:
        """The present moment."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks; on CUDA it waits for the second."""
        if self.device.type != "cuda":
            return max(0.0, end - start)  # a clock may be set back
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclasses.dataclass
class StepTimer:
    """Times one step and the calls of its closure.

    Example::

        timer = StepTimer(clock)
        with timer:
            optimizer.step(timer.forward(closure))
        timer.step_seconds, timer.forward_seconds
    """

    clock: Clock
    _start: Any = None
    _end: Any = None
    _forwards: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)

    def __enter__(self) -> StepTimer:
        self._start = self.clock.mark()
        return self

    def __exit__(self, *_: object) -> None:
        self._end = self.clock.mark()

    def forward(self, closure: Callable[[], T]) -> Callable[[], T]:
        """The closure, timed at each call."""

        def timed() -> T:
            start = self.clock.mark()
            result = closure()
            self._forwards.append((start, self.clock.mark()))
            return result

        return timed

    @property
    def step_seconds(self) -> float:
        """Duration of the block."""
        return self.clock.seconds(self._start, self._end)

    @property
    def forward_seconds(self) -> float:
        """Duration of the closure's calls together."""
        return sum(self.clock.seconds(a, b) for a, b in self._forwards)


@dataclasses.dataclass
class PeakMemory:
    """Most bytes of tensors alive at once in a block, beyond those alive before it. ``bytes`` is None where nothing counts them.

    ``kept`` is what the block left alive; None as ``bytes``.
    """

    device: torch.device
    bytes: int | None = None
    kept: int | None = None

    def then(self, later: PeakMemory) -> PeakMemory:
        """The peak of this block and of a later one, together."""
        if self.bytes is None or self.kept is None or later.bytes is None or later.kept is None:
            return PeakMemory(self.device)
        return PeakMemory(self.device, max(self.bytes, self.kept + later.bytes), self.kept + later.kept)


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Measures the block: by the allocator's counter on CUDA, by the profiler's record of every allocation on the CPU."""
    result = PeakMemory(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield result
        torch.cuda.synchronize(device)
        result.bytes = torch.cuda.max_memory_allocated(device) - before
        result.kept = torch.cuda.memory_allocated(device) - before
    elif device.type == "cpu":
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes its own start and stop to stderr
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            yield result
        result.bytes, result.kept = _peak_of_events(profile)
    else:
        yield result


def _peak_of_events(profile: torch.profiler.profile) -> tuple[int, int]:
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    peak = alive = 0
    for _, _, nbytes in changes:
        alive += nbytes
        peak = max(peak, alive)
    return peak, alive
