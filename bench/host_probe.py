"""What a probe costs the host: after one layer, and in a whole step. Driver and compiler are stubs (``stub.py``), and so are the
modules themselves, so that what remains is the Python of this library and Triton's, up to the driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lozo_kernels import LOZO
from lozo_kernels.bench.timing import quantile
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.kernels.registry import registered
from lozo_kernels.model.interrupts import deferred_interrupt
from lozo_kernels.model.patching import patch
from lozo_kernels.model.probe.handle import ProbeHandle
from lozo_kernels.model.storage import layer_kind

EXAMPLES, LENGTH = 2, 1  # few, because what the CPU computes in place of a GPU is not to be measured
LEAST_CALLS = 0.02
"""Seconds that a repeat of a short call lasts at least."""


def rows_of(name: str, model: nn.Module, repeats: int) -> list[dict[str, Any]]:
    """Measures the layers and the steps of one model. Its weights are never touched."""
    launcher = Launcher()
    backend = TritonBackend(launcher)
    backend.name = "stub"
    rows = []
    with registered(backend):
        for evaluation in ("sequential", "batched"):
            examples = EXAMPLES * (2 if evaluation == "batched" else 1)
            calls = _without_work(model, examples)
            handle = patch(model, backend=backend.name, placement="probe", rank=4, interval=1 << 20)
            assert isinstance(handle, ProbeHandle)
            _choose_sides(handle)
            if evaluation == "sequential":
                rows += [{"model": name} | row for row in _layers(handle, calls, launcher, repeats)]
            step = _step(handle, calls, evaluation, examples)
            rows.append({"model": name, "pass": f"step, {evaluation}", "tensors": len(handle.names)})
            rows[-1] |= _timed(step, launcher, max(3, repeats // 30))
            handle.restore(discard=True)
    return rows


def _without_work(model: nn.Module, examples: int) -> dict[nn.Module, Tensor]:
    """Lets modules that have parameters return a tensor that is there already; returns what each is called with."""
    shared: dict[tuple[int, ...], Tensor] = {}

    def activations(width: int) -> Tensor:
        return shared.setdefault((width,), torch.empty(examples, LENGTH, width, dtype=torch.bfloat16, device="cpu"))

    calls: dict[nn.Module, Tensor] = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            calls[module], width = torch.zeros(examples, LENGTH, dtype=torch.int64, device="cpu"), module.embedding_dim
        elif isinstance(module, nn.Linear):
            calls[module], width = activations(module.in_features), module.out_features
        elif isinstance(module, nn.LayerNorm):
            calls[module], width = activations(module.normalized_shape[0]), module.normalized_shape[0]
        else:
            continue
        module.forward = _Returns(activations(width))  # type: ignore[method-assign]
    return calls


class _Returns:
    """A forward that does nothing."""

    def __init__(self, output: Tensor) -> None:
        self._output = output
        self.__name__ = "forward"

    def __call__(self, _: Tensor) -> Tensor:
        return self._output


def _choose_sides(handle: ProbeHandle) -> None:
    """Puts every parameter where a probe of few tokens has it."""
    weights = {m.owners[0].module: m.index for m in handle.members if m.parameter.low_rank}
    sides: list[list[Any]] = []
    for member in handle.members:
        module = member.owners[0].module
        if member.parameter.low_rank:
            known = all(layer_kind(owner) is not None for owner in member.owners)
            sides.append(["activation" if known else "scratch", None, None])
        elif module in weights:
            sides.append(["shift", [], weights[module]])
        else:
            sides.append(["copy", None, None])
    handle.adopt_sides({"sides": sides, "precision": "bfloat16"}, install=True)
    handle.prepare = lambda *_, **__: None  # type: ignore[method-assign]
    handle.check_batches = lambda *_, **__: True  # type: ignore[method-assign]


def _layers(handle: ProbeHandle, calls: dict[nn.Module, Tensor], launcher: Launcher, repeats: int) -> Iterator[dict[str, Any]]:
    handle.perturb_(0, 1e-3)
    sides = {}
    for member in handle.members:
        kind = layer_kind(member.owners[0]) if member.side == "activation" else None
        what = {"linear": "activation side", "embedding": "embedding", None: f"{member.side} side"}[kind]
        if member.parameter.low_rank:
            sides.setdefault(what, member.owners[0].module)
    with deferred_interrupt():  # as in a step
        for what, module in sides.items():
            yield {"pass": f"layer, {what}", "tensors": 1} | _timed(lambda m=module: m.forward(calls[m]), launcher, repeats)
    handle.rest_()


def _step(handle: ProbeHandle, calls: dict[nn.Module, Tensor], evaluation: str, examples: int) -> Callable[[], object]:
    optimizer = LOZO(handle, lr=1e-6, evaluation=evaluation, common_random_numbers=False)
    loss, losses = torch.zeros(()), torch.zeros(examples)

    def forward() -> None:
        for module, x in calls.items():
            module.forward(x)

    if evaluation == "batched":
        batch = torch.zeros(EXAMPLES, LENGTH, dtype=torch.int64, device="cpu")
        return lambda: optimizer.step(lambda _: forward() or losses, batch)
    return lambda: optimizer.step(lambda: forward() or loss)


@torch.no_grad()
def _timed(call: Callable[[], object], launcher: Launcher, repeats: int) -> dict[str, Any]:
    """Microseconds of the process, without what others do on the machine."""
    for _ in range(3):
        call()
    launcher.launches = 0
    start = time.process_time()
    call()
    launches, times = launcher.launches, max(1, int(LEAST_CALLS / max(1e-6, time.process_time() - start)))
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(times):
            call()
        seconds.append((time.process_time() - start) / times)
    return microseconds(seconds) | {"launches": launches}


def microseconds(seconds: Sequence[float]) -> dict[str, float]:
    """The least time, which the load of the machine raises least, and the quartiles."""
    quartiles = {"q25": 0.25, "median": 0.5, "q75": 0.75}
    found = {"least": min(seconds)} | {name: quantile(seconds, p) for name, p in quartiles.items()}
    return {name: round(1e6 * value, 1) for name, value in found.items()}
