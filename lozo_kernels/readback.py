"""Numbers from a device that arrive when they arrive: nobody waits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Readback:
    """Copies a small integer tensor to the host, one request at a time."""

    def __init__(self) -> None:
        self._copy: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def read(self, make: Callable[[], Tensor]) -> list[int] | None:
        """The values of the last request that arrived, once, or None while it is on its way.

        Args:
            make: what to request next. On the CPU it is read at once.
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
        self._copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._copy.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(tensor.device))
        return values
