"""A Triton that compiles nothing and launches nothing, for what a launch costs Python on a machine without a GPU.

The driver and the compiler are replaced. Everything between a call of a kernel and the driver is Triton's own. The process has to
be one in which kernels are not interpreted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from lozo_kernels.kernels.backends.triton import activations, plans, work

OnLaunch = Callable[["StubKernel", int, tuple[Any, ...]], None]
"""Told of a launch: the kernel, the number of programs, and the arguments as a driver gets them."""


class StubDriver:
    """One device of NVIDIA's, whose launches do nothing."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:  # noqa: ARG002  (as drivers have it)
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class StubKernel(CompiledKernel):  # type: ignore[misc]
    """A kernel that was compiled for one signature. Launching it calls ``on_launch``, or does nothing."""

    def __init__(self, source: Any, on_launch: OnLaunch | None) -> None:
        self.src, self.name, self.hash = source, source.fn.__name__, ""
        self.variant = str((self.name, source.signature, source.constants, sorted(source.attrs.items())))
        self.module, self.function, self.packed_metadata, self._module_pid = 1, 1, (), None
        self._run = _nothing if on_launch is None else self._launched
        self._on_launch = on_launch

    def _launched(self, *arguments: Any) -> None:
        assert self._on_launch is not None
        self._on_launch(self, arguments[0], arguments[9:])


def install(on_launch: OnLaunch | None = None) -> None:
    """Replaces driver and compiler for the rest of the process, and has kernels on the CPU launched as those of a GPU."""
    driver.set_active(StubDriver())
    triton.compiler.compile = lambda source, **_: StubKernel(source, on_launch)
    nvidia = plans.Target(dp4a=True, eights=False, emulate=False, tf32=True)
    for module in (activations, work):
        module.target_of = lambda _: nvidia  # type: ignore[attr-defined]


def _nothing(*arguments: Any) -> None: ...
