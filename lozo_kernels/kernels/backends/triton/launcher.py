"""Launching Triton kernels, counted."""

from __future__ import annotations

from typing import Any

import torch

from .plans import Plan


class Launcher:
    """Runs one kernel per call on the current stream of the device of its arguments.

    Attributes:
        launches: how many were made.
    """

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, plan: Plan, programs: int, device: torch.device, *arguments: Any) -> None:
        """``programs`` programs of a plan's kernel with its runtime arguments in order. None: nothing is launched."""
        if programs == 0:
            return
        self.launches += 1
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.run(plan, programs, arguments)
        else:
            self.run(plan, programs, arguments)

    def run(self, plan: Plan, programs: int, arguments: tuple[Any, ...]) -> None:
        """The launch itself."""
        plan.kernel[(programs,)](*arguments, **plan.constants, **plan.options)
