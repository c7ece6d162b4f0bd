"""Memory of a step on the CPU. The profiler of torch sees every allocation of torch, and the system sees the rest."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .memory_use import STEPS, Closure, MemoryUse, Step

_FORWARD, _REALLOCATE = "lozo_kernels.bench.forward", "lozo_kernels.bench.reallocate"
_FIRST, _FIRST_FORWARD = "lozo_kernels.bench.first", "lozo_kernels.bench.first_forward"
_SPANS = (_FORWARD, _REALLOCATE, _FIRST, _FIRST_FORWARD)


def measure_memory(model: nn.Module, closure: Closure, make_step: Callable[[], Step], *, prepares: bool = False) -> MemoryUse:
    """Measures the memory of steps on a model on the CPU, which change its weights.

    Args:
        closure: a forward pass of the model that returns its loss.
        make_step: makes an optimiser for the model and returns its step, which takes a closure; called twice.
        prepares: whether a step before the others prepares the optimiser; it is counted apart.
    """
    with torch.no_grad():
        closure()  # libraries keep workspaces after their first use
        forward = _peak(_allocations(closure))

    def marked(span: str) -> Closure:
        def call(*inputs: Any) -> Tensor:
            with torch.profiler.record_function(span):
                return closure(*inputs)

        return call

    def steps() -> list[Step]:
        # The profiler sees a release only of what it saw allocated: without this, code that replaces its weights would seem
        # to keep the old ones.
        with torch.profiler.record_function(_REALLOCATE):
            for p in model.parameters():
                p.data = p.data.clone()
        step = make_step()
        if prepares:
            with torch.profiler.record_function(_FIRST):
                step(marked(_FIRST_FORWARD))
        for _ in range(STEPS):
            step(marked(_FORWARD))
        return [step]  # keeps the optimiser alive until its memory was read

    resident = _resident_growth(closure, make_step, prepares)
    peaks = {_FORWARD: 0, _FIRST_FORWARD: 0, _FIRST: 0, None: 0}
    alive = 0
    for change, span in _allocations(steps):
        if span != _REALLOCATE:
            alive += change
            peaks[span] = max(peaks[span], alive)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    extra = max(peaks[None], peaks[_FORWARD] - forward, alive)
    first = max(peaks[_FIRST], peaks[_FIRST_FORWARD] - forward) if prepares else None
    return MemoryUse(weights, forward, max(0, alive), extra, resident, first_step=first)


def _allocations(call: Callable[[], object]) -> list[tuple[int, str | None]]:
    """Lists what torch allocates (bytes) and releases (negative bytes) during a call, with the innermost marked span around it.

    What the call returns is alive until the end.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes its own start and stop to stderr
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    del result
    nodes = _flatten(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    spans = [(n.start_time_ns, n.end_time_ns, n.name) for n in nodes if n.name in _SPANS]
    spans.sort(key=lambda span: span[1] - span[0])
    sizes: dict[int, int] = {}
    changes = []
    for node in sorted((n for n in nodes if n.name == "[memory]"), key=lambda n: n.start_time_ns):
        address, size = node.extra_fields.ptr, node.extra_fields.alloc_size
        if size > 0:
            sizes[address] = size
        elif address in sizes:
            size = -sizes.pop(address)
        else:
            continue  # of something older than the call
        changes.append((size, next((name for start, end, name in spans if start <= node.start_time_ns <= end), None)))
    return changes


def _flatten(nodes: Iterable[Any]) -> list[Any]:
    """Lists the nodes of a profile and everything below them."""
    found, stack = [], list(nodes)
    while stack:
        node = stack.pop()
        found.append(node)
        stack += node.children
    return found


def _peak(events: Sequence[tuple[int, str | None]]) -> int:
    peak = alive = 0
    for change, _ in events:
        alive += change
        peak = max(peak, alive)
    return peak


def _resident_growth(closure: Closure, make_step: Callable[[], Step], prepares: bool) -> int | None:
    """Measures by how much the resident set grows at most during steps (Linux).

    The closure computes nothing, so that a forward pass hides nothing. A probe works inside its forward passes, so what these take
    without it is subtracted.
    """
    loss = torch.zeros((), dtype=torch.float32, device="cpu")
    try:
        with torch.no_grad():
            before = _begin()
            forward = _high_water(before, closure) if prepares else 0
        before = _begin()
        step = make_step()
        if prepares:
            step(closure)
            _begin()
        call = closure if prepares else lambda: loss
        return max(0, _high_water(before, *[lambda: step(call)] * STEPS) - forward)
    except (OSError, AttributeError, KeyError):
        return None


def _begin() -> int:
    """Returns the resident set, and starts its high-water mark anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds on to would hide an allocation
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _status_bytes("VmRSS")


def _high_water(before: int, *calls: Callable[[], object]) -> int:
    for call in calls:
        call()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(lines[field].split()[0]) << 10
