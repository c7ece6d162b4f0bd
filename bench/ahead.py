"""Compiles Triton kernels into Triton's cache before anything launches them, on all cores and without a GPU.

What later stages launch is found by making the same calls on CPU tensors with a launcher that notes each launch. A stub takes the
place of Triton's driver, so that no process has a CUDA context. What is compiled is what the launch would compile: the same
function, constants and options, and arguments of the same types and alignment.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from lozo_kernels.kernels.backends.triton import TritonBackend, activations, points, resample, work
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.kernels.backends.triton.plans import Plan, Target
from lozo_kernels.kernels.backends.triton.tilesizes import TileSize, tile_sizes
from lozo_kernels.kernels.calls import LayerCall, PointsCall, TableCall
from lozo_kernels.kernels.op_table import Op
from lozo_kernels.kernels.registry import choose_backend
from lozo_kernels.kernels.table import TensorTable

_ADDRESS = 16  # what Triton looks at of an address: whether it is a multiple of this


class StubDriver:
    """A driver of Triton for a GPU that is not there. Launches do nothing."""

    def __init__(self, capability: str) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", int(capability.replace(".", "")), 32)
        self.utils = self

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 64, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *_: None

    def is_active(self) -> bool:
        return True


@contextlib.contextmanager
def stubbed(capability: str) -> Iterator[None]:
    """Compiles in the body for an NVIDIA GPU of a compute capability ("9.0"), and plans CPU tensors as that GPU's.

    Raises:
        RuntimeError: Triton interprets its kernels here.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("Triton was asked to interpret kernels (TRITON_INTERPRET); nothing can be compiled")
    from triton.runtime.driver import driver

    modules = (work, activations, points, resample)
    before = [module.target_of for module in modules]
    driver.set_active(StubDriver(capability))
    for module in modules:
        module.target_of = lambda _: Target(dp4a=True, eights=False, emulate=False, tf32=True)  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, target_of in zip(modules, before, strict=True):
            module.target_of = target_of  # type: ignore[assignment]
        with contextlib.suppress(RuntimeError):  # where there is no GPU there is no driver to go back to
            driver.reset_active()


@dataclasses.dataclass(frozen=True)
class Argument:
    """Stands for a tensor in the arguments of a compilation."""

    dtype: torch.dtype
    aligned: bool

    def data_ptr(self) -> int:
        return 0 if self.aligned else _ADDRESS // 2


@dataclasses.dataclass(frozen=True)
class Job:
    """A compilation: a function by module and name, its arguments (tensors as :class:`Argument`) and the keywords of its launch."""

    module: str
    name: str
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]

    def run(self) -> None:
        """Compiles, unless Triton's cache has it."""
        function = getattr(importlib.import_module(self.module), self.name)
        kernel = function.warmup(*self.arguments, grid=(1,), **dict(self.keywords))
        _compile_launcher(kernel)


def _compile_launcher(kernel: Any) -> None:
    """Compiles the C code of a launch, which Triton up to 3.6 makes for every signature. It needs libcuda, a part of the driver."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        # Without libcuda (a dry run) it is compiled, and then cannot be loaded or linked.
        with contextlib.suppress(ImportError, AssertionError, OSError):
            driver.CudaLauncher(kernel.src, kernel.metadata)


def forget() -> None:
    """Makes this process forget what it has loaded of Triton's cache, as a new process would."""
    for name, module in list(sys.modules.items()):
        if name.startswith("lozo_kernels.kernels.backends.triton."):
            for function in vars(module).values():
                if hasattr(function, "device_caches"):
                    function.device_caches.clear()


def job_of(plan: Plan, arguments: tuple[Any, ...]) -> Job:
    """Describes what a launch compiles. Launches that compile the same have the same description."""
    function = plan.kernel

    def described(value: Any, param: Any) -> Any:
        if isinstance(value, Tensor):
            return Argument(value.dtype, value.data_ptr() % _ADDRESS == 0)
        if type(value) is not int or value < -(1 << 31) or value >= 1 << 31:
            return value
        if param.do_not_specialize:
            return 3
        return 1 if value == 1 else 16 if value % 16 == 0 else 3

    given = tuple(described(value, param) for value, param in zip(arguments, function.params, strict=False))
    return Job(function.fn.__module__, function.fn.__name__, given, tuple({**plan.constants, **plan.options}.items()))


Note = Callable[[Job], None] | Launcher
"""What becomes of launches: their jobs are noted, or a launcher makes them."""


class Recorder(Launcher):
    """Notes what is launched and launches nothing."""

    def __init__(self, note: Callable[[Job], None]) -> None:
        super().__init__()
        self._note = note

    def run(self, plan: Plan, programs: int, arguments: tuple[Any, ...]) -> None:  # noqa: ARG002
        self._note(job_of(plan, arguments))


class RecordingBackend(TritonBackend):
    """The Triton backend of a device, on CPU tensors, whose launches are only noted.

    Args:
        note: called with what each launch compiles, or a launcher that launches really, on the stubbed driver.
        device_name: whose tile sizes are taken; None for the defaults.
        compute: whether the CPU's own backend does the work, for calls whose results matter.
        layer: called with each call on activations.
    """

    name = "recording"

    def __init__(
        self,
        note: Note,
        device_name: str | None = None,
        *,
        compute: bool = False,
        sizes: dict[str, TileSize] | None = None,
        layer: Callable[[LayerCall, bool], None] | None = None,
    ) -> None:
        super().__init__(note if isinstance(note, Launcher) else Recorder(note), sizes)
        self._device_name, self._given, self._layer = device_name, sizes or {}, layer
        self._right = choose_backend("cpu").backend if compute else None

    def opt_in_reason(self, device: torch.device) -> str | None:  # noqa: ARG002
        return "it only notes launches"

    def run(self, op: Op, table: TensorTable, call: TableCall) -> None:
        super().run(op, table, call)
        if self._right is not None:
            self._right.run(op, table, call)

    def resample_(self, table: TensorTable, seed: int, window: int, reproject: bool) -> None:
        super().resample_(table, seed, window, reproject)
        if self._right is not None:
            self._right.resample_(table, seed, window, reproject)

    def lowrank_linear_(self, call: LayerCall) -> None:
        super().lowrank_linear_(call)
        self._after_layer(call, lookup=False)

    def lowrank_embedding_(self, call: LayerCall) -> None:
        super().lowrank_embedding_(call)
        self._after_layer(call, lookup=True)

    def lowrank_points_(self, call: PointsCall) -> None:
        super().lowrank_points_(call)
        if self._right is not None:
            self._right.lowrank_points_(call)

    def _after_layer(self, call: LayerCall, *, lookup: bool) -> None:
        if self._layer is not None:
            self._layer(call, lookup)
        if self._right is not None:
            (self._right.lowrank_embedding_ if lookup else self._right.lowrank_linear_)(call)

    def _size(self, kernel: str, device: torch.device, aligned: bool, rank: int, stochastic: bool) -> TileSize:  # noqa: ARG002
        return self._given.get(kernel) or tile_sizes(self._device_name).find(kernel, aligned, rank, stochastic)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compilation took, in CPU seconds with its subprocesses, and why it failed."""

    seconds: float
    failed: str | None = None


def compile_job(job: Job) -> Compiled:
    """Runs a job in this process."""
    before = _cpu_seconds()
    failed = None
    try:
        job.run()
    except Exception as e:  # a size that cannot be compiled, as some of the tuner's
        failed = f"{job.name}: {type(e).__name__}: {str(e).strip().splitlines()[0][:200] if str(e).strip() else 'no message'}"
    return Compiled(_cpu_seconds() - before, failed)


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


class Compilers:
    """Processes that compile jobs while others are still being found.

    Args:
        processes: how many; they are forked at once, before torch has threads, and take over the stubbed driver.
        nice: how much they stand back for other processes.
    """

    def __init__(self, processes: int, nice: int = 0) -> None:
        self._pool = multiprocessing.get_context("fork").Pool(processes, os.nice, (nice,))
        self.stages: dict[str, list[Job]] = {}
        self._asked: dict[Job, Any] = {}

    def note(self, stage: str) -> Callable[[Job], None]:
        """Returns what takes the jobs of a stage. A job that several stages need is compiled once, for the first of them."""
        jobs = self.stages.setdefault(stage, [])

        def take(job: Job) -> None:
            if job not in self._asked:
                self._asked[job] = self._pool.apply_async(compile_job, (job,))
                jobs.append(job)

        return take

    def done(self) -> dict[str, list[Compiled]]:
        """Returns what is compiled so far, by stage."""
        return {s: [self._asked[job].get() for job in jobs if self._asked[job].ready()] for s, jobs in self.stages.items()}

    def wait(self, seconds: float) -> bool:
        """Waits until everything is compiled, for so long at most. Returns whether it is."""
        end = time.monotonic() + seconds
        for result in self._asked.values():
            result.wait(max(0.0, end - time.monotonic()))
        return all(result.ready() for result in self._asked.values())

    def close(self) -> None:
        """Ends the processes; what is being compiled is dropped."""
        self._pool.terminate()
        self._pool.join()
