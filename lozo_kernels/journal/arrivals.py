"""The numbers of a step on their way from its device. Nothing waits for them, and no later step overwrites them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..optim.optimizer import ZerothOrderOptimizer
from ..optim.readback import to_host
from ..optim.steps import StepInfo
from .format import StepTaken


@dataclasses.dataclass
class Arrival:
    """A step whose numbers may not be on the host yet.

    Attributes:
        values: c, whether the step was skipped, and those settings of groups that are tensors.
        arrived: the event that tells when they are there; None if they are.
        lr, weight_decay: of each group; None if they are in ``values``.
    """

    values: Tensor
    arrived: Any
    directions: int
    lr: Sequence[float | None]
    weight_decay: Sequence[float | None]
    at_rest: bool
    returned: bool

    def ready(self) -> bool:
        """Whether reading the numbers waits for nothing."""
        return self.arrived is None or self.arrived.query()

    def wait(self) -> None:
        """Waits for the numbers."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def step(self) -> StepTaken:
        """Returns the record."""
        values = self.values.tolist()
        c, skipped, rest = values[: self.directions], bool(values[self.directions]), iter(values[self.directions + 1 :])
        lr, decay = (tuple(next(rest) if v is None else v for v in some) for some in (self.lr, self.weight_decay))
        return StepTaken(tuple(c), lr, decay, skipped, self.at_rest, self.returned)


def send(optimizer: ZerothOrderOptimizer, info: StepInfo, *, at_rest: bool, returned: bool) -> Arrival:
    """Sends the numbers of a step on their way. On the CPU they are there at once."""
    groups = optimizer.param_groups
    lr, decay = optimizer.learning_rates, [g["weight_decay"] for g in groups]
    tensors = [v.detach().to(info.c.device, torch.float64, non_blocking=True) for v in (*lr, *decay) if isinstance(v, Tensor)]
    values, arrived = to_host(torch.cat([info.c, *(v.to(torch.float64).reshape(1) for v in (info.skipped, *tensors))]))
    return Arrival(values, arrived, optimizer.directions, _plain(lr), _plain(decay), at_rest, returned)


def _plain(values: Sequence[Any]) -> list[float | None]:
    return [None if isinstance(v, Tensor) else float(v) for v in values]
