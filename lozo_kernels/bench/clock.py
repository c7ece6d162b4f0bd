"""The clocks that time a call: that of the host, or events in a GPU's stream, which are read only after a round."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

_AHEAD_CYCLES = 500_000  # about 0.3 ms of a GPU: longer than the host needs to launch a pass, as in a training loop
_L2_BYTES = 64 << 20  # where the device does not tell
_L2_MULTIPLE = 4  # of the L2, overwritten to make it cold: its replacement policy need not be least recently used


class Clock(Protocol):
    """Marks moments and tells the seconds between two of them."""

    cold: str
    """How the caches are made cold before a timed call, for a result file."""

    def prepare(self) -> None:
        """Called before each timed call, outside its time."""

    def mark(self) -> Any:
        """This moment. Waits for nothing."""

    def wait(self) -> None:
        """Returns when every moment that was marked has come."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks; after :meth:`wait`."""


class HostClock:
    """``time.perf_counter``, which is right where a call returns only when its work is done."""

    cold = "not made cold: the weights are larger than the caches unless noted"

    def prepare(self) -> None:
        pass

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        pass

    def seconds(self, start: float, end: float) -> float:
        return end - start


class EventClock:
    """Events in the current stream of the current CUDA device. They tell its own time; the host runs ahead, as in training.

    Args:
        overwrite: a tensor on the device, larger than the L2, that is overwritten before each timed call; the device is then kept
            busy for a while, so that no time is counted in which it waits for the host to launch. None for neither.
        make_event: makes an event with ``record``, ``synchronize`` and ``elapsed_time`` in milliseconds; for tests.
    """

    def __init__(self, overwrite: Tensor | None = None, make_event: Callable[[], Any] | None = None) -> None:
        self._overwrite = overwrite
        self._make_event = make_event or (lambda: torch.cuda.Event(enable_timing=True))
        self._on_gpu = make_event is None
        self._last: Any = None
        self.cold = "not made cold: the weights are many times the L2"
        if overwrite is not None:
            size = overwrite.numel() * overwrite.element_size()
            self.cold = (
                f"{size} bytes of other memory overwritten before each timed call, which is launched while the device is busy"
            )

    def prepare(self) -> None:
        if self._overwrite is not None:
            self._overwrite.zero_()  # in the stream, so that the start event comes after it
            if self._on_gpu:
                torch.cuda._sleep(_AHEAD_CYCLES)  # noqa: SLF001 - there is no public call that keeps a device busy

    def mark(self) -> Any:
        self._last = self._make_event()
        self._last.record()
        return self._last

    def wait(self) -> None:
        if self._last is not None:
            self._last.synchronize()

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device, *, cold: bool = False) -> Clock:
    """Returns the clock for a device.

    Args:
        cold: on a GPU, make the L2 cold before each timed call.
    """
    if device.type != "cuda":
        return HostClock()
    overwrite = None
    if cold:
        size = _L2_MULTIPLE * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", _L2_BYTES)
        overwrite = torch.empty(size, dtype=torch.int8, device=device)
    return EventClock(overwrite)
