"""Launches Triton kernels, and counts the launches."""

from __future__ import annotations

from typing import Any

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from .plans import Plan


class Launcher:
    """Launches kernels on the current stream of a device.

    Attributes:
        launches: how many launches were made.
    """

    def __init__(self) -> None:
        self.launches = 0

    def launch(self, plan: Plan, programs: int, device: torch.device, *arguments: Any) -> Any:
        """Launches a plan's kernel with its runtime arguments in order, unless the number of programs is 0.

        Returns:
            The compiled kernel that was launched, for :class:`PreparedLaunch`; None if there is none.
        """
        if programs == 0:
            return None
        self.launches += 1
        if device.type == "cuda":
            with torch.cuda.device(device):
                return self.run(plan, programs, arguments)
        return self.run(plan, programs, arguments)

    def run(self, plan: Plan, programs: int, arguments: tuple[Any, ...]) -> Any:
        """Makes one launch, and returns the compiled kernel. Tests override it."""
        return plan.kernel[(programs,)](*arguments, **plan.constants, **plan.options)


class PreparedLaunch:
    """A launch that is made again and again with other tensors and words of the noise.

    The first time Triton finds the compiled kernel for the arguments. From then on that kernel is launched directly, as a call of
    a kernel does in the end, which takes a tenth of the time. Where somebody watches launches (a profiler's hooks), every launch
    is one of Triton's own.

    Args:
        launcher: makes the launches that are not prepared yet, and counts all.
        last: the runtime arguments that stay the same, which are the last ones.

    Whoever calls it answers for this: the dtypes of the tensors and whether their addresses are multiples of 16 stay the same,
    and so do all numbers for which the kernel is specialised.
    """

    def __init__(self, launcher: Launcher, plan: Plan, programs: int, device: torch.device, last: tuple[int, ...]) -> None:
        self._launcher = launcher
        self._plan = plan
        self._programs = programs
        self._device = device
        self._last = last
        self._compiled: CompiledKernel | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launches the kernel with these arguments and then the last ones."""
        if self._compiled is None or _are_watched(self._kernel):
            found = self._launcher.launch(self._plan, self._programs, self._device, *arguments, *self._last)
            if self._compiled is None and isinstance(found, CompiledKernel):
                self._keep(found, len(arguments))
            return
        self._launcher.launches += 1
        active = driver.active
        if active.get_current_device() == self._index:
            self._launch(active, arguments)
        else:
            with torch.cuda.device(self._device):
                self._launch(active, arguments)

    def _keep(self, compiled: CompiledKernel, arguments: int) -> None:
        self._kernel = self._plan.kernel
        names = self._kernel.arg_names[arguments + len(self._last) :]
        self._rest = (*self._last, *(self._plan.constants[name] for name in names))  # launchers count the constants too
        self._index = self._device.index if self._device.type == "cuda" else driver.active.get_current_device()
        self._run, self._function, self._metadata = compiled.run, compiled.function, compiled.packed_metadata
        self._compiled = compiled

    def _launch(self, active: Any, arguments: tuple[Any, ...]) -> None:
        stream = active.get_current_stream(self._index)
        self._run(self._programs, 1, 1, stream, self._function, self._metadata, None, None, None, *arguments, *self._rest)


def _are_watched(kernel: Any) -> bool:
    """Whether hooks are to be called for a launch."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    return bool(kernel.pre_run_hooks)
