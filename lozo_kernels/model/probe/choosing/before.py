"""What an evaluation changes besides its loss, as it was before: random numbers and buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ...losses import Randomness
from ...modules import own_buffers


class Before:
    """Random numbers, and the buffers of a module, as they were when this was made.

    Attributes:
        randomness: what was given, or the random numbers that come next.
    """

    def __init__(self, module: nn.Module, devices: Sequence[torch.device], randomness: Randomness | None = None) -> None:
        self.randomness = Randomness(devices) if randomness is None else randomness
        owners = [own_buffers(inner) for inner in module.modules()]
        self._buffers = [(own, name, b, b.detach().clone()) for own in owners for name, b in own.items() if b is not None]

    def put_back(self) -> None:
        """Puts everything back."""
        self.randomness.replay()
        with torch.no_grad():
            for own, name, buffer, before in self._buffers:
                own[name] = buffer
                buffer.copy_(before)
