"""``lozo-kernels bench memory``: what a step needs beyond the weights and the memory of its forward passes."""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import handle_of
from ..environment import OtherLoad, environment
from ..errors import InputError
from .arguments import DTYPE_NAMES, add_common, add_model, check_output, positive
from .document import format_table, progress, publish
from .models import MODELS, build_model
from .step import causal_forward, make_optimizer, make_published

Row = dict[str, Any]
Closure = Callable[[], Tensor]
Step = Callable[[Closure], object]

METHODS = ("lozo", "lozo-fused", "lozo-m", "mezo", "published lozo", "published lozo-m", "published mezo")
TARGET = 0.01
"""The project's goal for every method of this library at rank 4: extra bytes as a share of the weights."""

_STEPS = 2  # the second of a fused optimiser makes the pass that it owes
_FORWARD, _REALLOCATE = "lozo_kernels.bench.forward", "lozo_kernels.bench.reallocate"


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Memory of steps, in bytes, beyond what was there before the optimiser was made.

    Attributes:
        weights: the trained parameters.
        forward: peak of a forward pass of the same closure without an optimiser.
        persistent: still alive after the steps: V, N, tables.
        extra: the larger of the peak outside the forward passes and the peak inside them less ``forward``. It includes
            ``persistent``; activations can't hide temporaries of the passes over the weights, because they are not alive then.
        resident: growth of the resident set during steps whose closure computes nothing, at its peak: what torch's allocator does
            not see, such as scratch of native code, is in it, and so is noise of the process. None where the system does not tell.
    """

    weights: int
    forward: int
    persistent: int
    extra: int
    resident: int | None

    @property
    def share(self) -> float:
        """``extra`` as a share of the weights."""
        return self.extra / self.weights


def measure_memory(model: nn.Module, closure: Closure, make_step: Callable[[], Step]) -> MemoryUse:
    """Memory use of steps on a model on the CPU. The weights move by two steps.

    Args:
        closure: a forward pass of the model that returns its loss.
        make_step: makes an optimiser for the model and returns its step, which takes a closure; called twice.
    """
    with torch.no_grad():
        closure()  # libraries keep workspaces after their first use
        forward = _peak(_allocations(closure))

    def steps() -> list[Step]:
        # The profiler sees a release only of what it saw allocated: without this, code that replaces its weights would seem
        # to keep the old ones.
        with torch.profiler.record_function(_REALLOCATE):
            for p in model.parameters():
                p.data = p.data.clone()
        step = make_step()
        for _ in range(_STEPS):
            step(marked)
        return [step]  # keeps the optimiser alive until its memory was read

    def marked() -> Tensor:
        with torch.profiler.record_function(_FORWARD):
            return closure()

    resident = _resident_growth(make_step)
    inside, outside, alive = 0, 0, 0
    for change, span in _allocations(steps):
        if span == _REALLOCATE:
            continue
        alive += change
        if span == _FORWARD:
            inside = max(inside, alive)
        else:
            outside = max(outside, alive)
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return MemoryUse(weights, forward, max(0, alive), max(outside, inside - forward, alive), resident)


def _allocations(call: Callable[[], object]) -> list[tuple[int, str | None]]:
    """Every allocation (bytes) of torch during a call and its release (negative bytes), and the marked span that it was in.

    What the call returns is alive until the end.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes its own start and stop to stderr
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        result = call()
    del result
    nodes = _flatten(profile.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    spans = [(n.start_time_ns, n.end_time_ns, n.name) for n in nodes if n.name in (_FORWARD, _REALLOCATE)]
    sizes: dict[int, int] = {}
    changes = []
    for node in sorted((n for n in nodes if n.name == "[memory]"), key=lambda n: n.start_time_ns):
        address, size = node.extra_fields.ptr, node.extra_fields.alloc_size
        if size > 0:
            sizes[address] = size
        elif address in sizes:
            size = -sizes.pop(address)
        else:
            continue  # of something older than the call
        changes.append((size, next((name for start, end, name in spans if start <= node.start_time_ns <= end), None)))
    return changes


def _flatten(nodes: Iterable[Any]) -> list[Any]:
    """The nodes of a profile and everything below them."""
    found, stack = [], list(nodes)
    while stack:
        node = stack.pop()
        found.append(node)
        stack += node.children
    return found


def _peak(events: Sequence[tuple[int, str | None]]) -> int:
    peak = alive = 0
    for change, _ in events:
        alive += change
        peak = max(peak, alive)
    return peak


def _resident_growth(make_step: Callable[[], Step]) -> int | None:
    """Peak growth of the resident set over steps with a closure that computes nothing (Linux)."""
    loss = torch.zeros(())
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc holds on to would hide an allocation
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before = _status_bytes("VmRSS")
        step = make_step()
        for _ in range(_STEPS):
            step(lambda: loss)
        return max(0, _status_bytes("VmHWM") - before)
    except (OSError, AttributeError, KeyError):
        return None


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) << 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    add_model(parser, METHODS)
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of the forward pass (default: 32)")


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures and prints.

    Raises:
        InputError: the device is not the CPU, transformers is missing, or the result cannot be written.
    """
    check_output(options.output)
    if options.device.type != "cpu":
        raise InputError(f"--device {options.device}: memory is measured on cpu so far")
    document = environment(options.device, argv)
    others = OtherLoad()
    document["model"] = options.model
    rows: list[Row] = []
    forward = causal_forward(options.tokens, options.device, MODELS[options.model].positions)
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        for method in options.methods:
            progress(f"{options.model} {name} {method}")
            use = measure_method(copy.deepcopy(model), forward, method, options.rank)
            row = {"method": method, "dtype": name, "rank": options.rank, "tokens": options.tokens}
            row |= {f"{key}_bytes": value for key, value in dataclasses.asdict(use).items()}
            rows.append(row | {"extra_percent": round(100 * use.share, 4)})
    document["cpus_used_by_others"] = others.mean()
    document |= {"targets": judge(rows), "rows": rows}
    publish(document, render, as_json=options.json, output=options.output)
    return 0


def measure_method(model: nn.Module, forward: Callable[[nn.Module], Tensor], method: str, rank: int) -> MemoryUse:
    """Memory use of a method of :data:`METHODS` on a model, which is changed.

    Args:
        forward: the loss of a model on a fixed batch.
    """

    def make_step() -> Step:
        if method.startswith("published "):
            return make_published(method.removeprefix("published "), model, rank).step
        patched = handle_of(model)
        if patched is not None:
            patched.restore()
        return make_optimizer(method, model, rank).step

    return measure_memory(model, lambda: forward(model), make_step)


def judge(rows: Sequence[Row]) -> list[Row]:
    """The target for every row of this library at rank 4."""
    return [
        {"method": row["method"], "dtype": row["dtype"], "rank": 4, "target_percent": 100 * TARGET}
        | {"measured_percent": row["extra_percent"], "met": row["extra_percent"] < 100 * TARGET}
        for row in rows
        if row["rank"] == 4 and not row["method"].startswith("published")
    ]


def render(document: Row) -> str:
    """The rows and the targets as text."""

    def mib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.2f}"

    header = (
        "method",
        "dtype",
        "rank",
        "weights MiB",
        "forward MiB",
        "persistent MiB",
        "extra MiB",
        "of weights",
        "resident MiB",
    )
    lines = [
        (
            row["method"],
            row["dtype"],
            str(row["rank"]),
            *(mib(row[f"{key}_bytes"]) for key in ("weights", "forward", "persistent", "extra")),
            f"{row['extra_percent']:.2f}%",
            mib(row["resident_bytes"]),
        )
        for row in document["rows"]
    ]
    goals = [
        f"{'met   ' if t['met'] else 'missed'}  {t['method']} {t['dtype']} rank {t['rank']}: {t['measured_percent']:.2f}% of the "
        f"weights, target under {t['target_percent']:g}%"
        for t in document["targets"]
    ]
    return "\n".join([format_table(header, lines, left=2), *([""] if goals else []), *goals])
