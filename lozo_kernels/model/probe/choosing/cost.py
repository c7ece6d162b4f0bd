"""Measures what the two sides of a probe cost on a device, with the ops themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator

import torch

from ....kernels import ops, skinny
from ....kernels.calls import Draw, LayerCall
from ....kernels.registry import choose_backend
from ....kernels.table import TensorTable

_ROUNDS = 5
_FEATURES = 1024
_TOKENS = 128
_SMALL = 64
_WEIGHTS = 4  # used one after the other, so that none is in a cache from the call before
_LARGE = 2048


@dataclasses.dataclass(frozen=True)
class Costs:
    """Seconds: ``call + tokens * (inputs + outputs) * feature`` on the activation side, ``fill + elements * element`` for scratch.

    Attributes:
        call, feature: of :func:`lozo_kernels.kernels.skinny.lowrank_linear_`.
        fill, element: of :func:`lozo_kernels.kernels.ops.lowrank_merge_` into other memory.
    """

    call: float
    feature: float
    fill: float
    element: float

    def activation(self, tokens: int, inputs: int, outputs: int) -> float:
        """Seconds of one layer in one evaluation."""
        return self.call + tokens * (inputs + outputs) * self.feature

    def scratch(self, elements: int) -> float:
        """Seconds of one weight in one evaluation."""
        return self.fill + elements * self.element


_MEASURING = threading.Lock()


def measure_costs(device: torch.device, dtype: torch.dtype, rank: int, backend_name: str | None) -> Costs:
    """Measures the costs, once in a process: the fastest of a few calls on small and larger tensors, as other load only adds.

    One thread measures, and others that ask at the same time get its result, so that two runs of a process choose the same sides.
    """
    with _MEASURING:
        return _measured(device, dtype, rank, backend_name)


@functools.lru_cache(maxsize=64)
def _measured(device: torch.device, dtype: torch.dtype, rank: int, backend_name: str | None) -> Costs:
    backend = choose_backend(device, backend_name).backend

    def activation(tokens: int, features: int) -> float:
        x, y = (torch.ones(tokens, features, dtype=dtype, device=device) for _ in range(2))
        v = torch.zeros(rank, features, dtype=torch.float16, device=device)
        b = torch.zeros(features, rank, dtype=torch.float32, device=device)
        draws, scales = torch.zeros(1, 2, dtype=torch.int64, device=device), torch.ones(1, device=device, dtype=torch.float32)
        call = LayerCall(y, x, v, b, 0, 0, 0, draws, scales)
        return fastest(lambda: skinny.dispatch(call, backend, lookup=False), device)

    def scratch(features: int) -> float:
        weights = [torch.ones(1, features, features, dtype=dtype, device=device) for _ in range(_WEIGHTS)]
        v = torch.zeros(1, rank, features, dtype=torch.float16, device=device)
        n = torch.zeros(1, features, rank, dtype=torch.float32, device=device)
        out = TensorTable([torch.empty_like(weights[0])], [0])
        tables = itertools.cycle([TensorTable([w], [0], v=[v], n=[n]) for w in weights])
        return fastest(
            lambda: ops.lowrank_merge_(next(tables), seed=0, draws=[Draw(0)], scales=1.0, out=out, backend=backend), device
        )

    with _one_thread():
        small, large = activation(1, _SMALL), activation(_TOKENS, _FEATURES)
        least, most = scratch(_SMALL), scratch(_LARGE)
    return Costs(small, max(0.0, large - small) / (2 * _TOKENS * _FEATURES), least, max(0.0, most - least) / _LARGE**2)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Runs the body on one thread: where cores are shared, several threads wait for each other, which hides what is measured."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of a few calls, after one to warm up."""
    seconds = []
    for _ in range(_ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return _available_ram()
    except (OSError, ValueError, StopIteration):
        return 1 << 62


def _available_ram() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
