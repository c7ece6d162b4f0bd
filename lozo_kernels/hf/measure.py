"""Time of steps and of the forward passes in them, and peak memory of a block."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from .objectives import Encoded, Objective

T = TypeVar("T")


def since(start: float) -> float:
    """Seconds since a value of ``time.perf_counter()``; 0 if the clock was set back."""
    return max(0.0, time.perf_counter() - start)


class Stopwatch:
    """Times named spans: marks while they run, seconds when somebody asks. On CUDA marks are events on the stream, which wait for
    nothing, and only reading the seconds waits for the device.

    Example::

        watch = Stopwatch(device)
        watch.start("step")
        optimizer.step(watch.timed("forwards", closure))
        watch.stop("step")
        watch.seconds("step"), watch.seconds("forwards")
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: collections.defaultdict[str, list[tuple[Any, Any]]] = collections.defaultdict(list)
        self._started: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begins a span."""
        self._started[name] = self._mark()

    def stop(self, name: str) -> None:
        """Ends the span of that name."""
        self._spans[name].append((self._started.pop(name), self._mark()))

    def timed(self, name: str, call: Callable[..., T]) -> Callable[..., T]:
        """The function, with a span around each call."""

        def timed_call(*args: Any, **kwargs: Any) -> T:
            self.start(name)
            try:
                return call(*args, **kwargs)
            finally:
                self.stop(name)

        return timed_call

    def count(self, name: str) -> int:
        """Spans of that name since the last :meth:`clear`."""
        return len(self._spans[name])

    def seconds(self, name: str) -> float:
        """Duration of all spans of that name together."""
        return sum(itertools.starmap(self._between, self._spans[name]))

    def clear(self) -> None:
        """Forgets all spans that have ended."""
        self._spans.clear()

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        if self.device.type != "cuda":
            return max(0.0, end - start)  # a clock may be set back
        end.synchronize()
        return start.elapsed_time(end) / 1e3


@dataclasses.dataclass
class PeakMemory:
    """Memory of a block.

    Attributes:
        bytes: most bytes of tensors alive at once in the block, beyond those alive before it; None where nothing counts them.
        kept: bytes that the block left alive; None where ``bytes`` is.
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


@torch.no_grad()
def forward_peak(closure: Callable[[], object], device: torch.device) -> int | None:
    """The peak memory of a forward pass without a graph, see :class:`PeakMemory`; the closure is called twice."""
    closure()  # libraries keep workspaces after their first use
    with peak_memory(device) as memory:
        closure()
    return memory.bytes


def inference_peaks(
    objective: Objective, model: torch.nn.Module, batches: Sequence[Sequence[Encoded]], device: torch.device
) -> list[int | None]:
    """The peak memory of a forward pass of each batch, see :func:`forward_peak`; the batch itself counts, as in a step."""

    def peak(batch: Sequence[Encoded]) -> int | None:
        return forward_peak(lambda: objective.loss(model, objective.collate(batch, device)), device)

    gc.collect()  # what is left of other models may be freed at any time: a block in which it is would seem to take less
    return [peak(batch) for batch in batches]


def _peak_of_events(profile: torch.profiler.profile) -> tuple[int, int]:
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    peak = alive = 0
    for _, _, nbytes in changes:
        alive += nbytes
        peak = max(peak, alive)
    return peak, alive
