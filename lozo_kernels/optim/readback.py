"""Copies numbers from a device to the host without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Readback:
    """Copies a small integer tensor to the host, one request at a time."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def read(self, make: Callable[[], Tensor]) -> list[int] | None:
        """Returns the values of the last request if they have arrived, and makes the next request; otherwise returns None.

        Args:
            make: makes the tensor of the next request. On the CPU its values are returned at once.
        """
        values = None
        if self._arrived is not None:
            if not self._arrived.query():
                return None
            assert self._copy is not None
            values, self._arrived = self._copy.tolist(), None
        tensor = make()
        if tensor.device.type == "cpu":
            return tensor.tolist()
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
        self._copy.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(tensor.device))
        return values


def to_host(values: Tensor) -> tuple[Tensor, Any]:
    """Returns a copy on the host and an event that tells when it has arrived, or None instead of the event if it is there."""
    if values.device.type != "cuda":
        return values.cpu(), None
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True, device="cpu")
    copy.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))
    return copy, arrived
