"""Memory of a step on a GPU, from the peaks of torch's caching allocator."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .memory_use import STEPS, Closure, MemoryUse, Step


def measure_memory(model: nn.Module, closure: Closure, make_step: Callable[[], Step], *, prepares: bool = False) -> MemoryUse:
    """Measures the memory of steps on a model on a CUDA device, which change its weights.

    Args:
        closure: a forward pass of the model that returns its loss.
        make_step: makes an optimiser for the model and returns its step, which takes a closure.
        prepares: whether a step before the others prepares the optimiser; it is counted apart.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        closure()  # libraries keep workspaces after their first use
    start = _settle(device)
    with torch.no_grad():
        closure()
    forward_peak, forward_reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)

    _settle(device)
    peaks = {"inside": 0, "outside": 0}
    reserved = 0

    def close(span: str) -> None:
        """Ends a span, keeps its peak and begins the next. The allocator keeps its peaks on the host, so nothing waits."""
        nonlocal reserved
        peaks[span] = max(peaks[span], torch.cuda.max_memory_allocated(device))
        reserved = max(reserved, torch.cuda.max_memory_reserved(device))
        torch.cuda.reset_peak_memory_stats(device)

    def marked(*inputs: Any) -> Tensor:
        close("outside")
        loss = closure(*inputs)
        close("inside")
        return loss

    def extra() -> int:
        return max(peaks["outside"] - start, peaks["inside"] - forward_peak)

    step = make_step()
    first = None
    if prepares:
        step(marked)
        close("outside")
        first = extra()
        peaks.update(inside=0, outside=0)
        _settle(device)
        reserved = 0
    for _ in range(STEPS):
        step(marked)
    close("outside")
    persistent = max(0, _settle(device) - start)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return MemoryUse(
        weights=weights,
        forward=forward_peak - start,
        persistent=persistent,
        extra=max(extra(), persistent),
        resident=None,
        forward_peak=forward_peak,
        peak=max(peaks.values()),
        forward_reserved=forward_reserved,
        reserved=reserved,
        first_step=first,
    )


def _settle(device: torch.device) -> int:
    """Gives back everything unused and starts the peaks anew; returns the bytes that are allocated."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
