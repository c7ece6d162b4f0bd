"""Launches Triton kernels, and counts the launches."""

from __future__ import annotations

from typing import Any

import torch

from .plans import Plan


class Launcher:
    """Launches kernels on the current stream of a device.

    Attributes:
        launches: how many launches were made.
    """

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, plan: Plan, programs: int, device: torch.device, *arguments: Any) -> None:
        """Launches a plan's kernel with its runtime arguments in order, unless the number of programs is 0."""
        if programs == 0:
            return
        self.launches += 1
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.run(plan, programs, arguments)
        else:
            self.run(plan, programs, arguments)

    def run(self, plan: Plan, programs: int, arguments: tuple[Any, ...]) -> None:
        """Makes one launch. Tests override it."""
        plan.kernel[(programs,)](*arguments, **plan.constants, **plan.options)
