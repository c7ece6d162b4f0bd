"""``lozo-kernels bench memory``: what a step needs beyond the weights and the memory of its forward passes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..model.text_table import mebibytes, text_table
from ..optim.optimizer import ZerothOrderOptimizer
from . import memory_cpu, memory_gpu
from .arguments import DTYPE_NAMES, add_choice, add_model, positive
from .batches import CausalBatch
from .deadline import Deadline
from .document import gb, progress, save_partial
from .entrants import Entrant, add_placement, entrants, make_optimizer, make_published
from .memory_use import MemoryUse, Step, out_of_memory
from .models import MODELS, build_model
from .op_calls import nbytes

Row = dict[str, Any]

METHODS = ("lozo", "lozo-fused", "lozo-m", "mezo", "published lozo", "published lozo-m", "published mezo")
DENSE_MOMENTUM = ("mezo-m", "published mezo-m")
"""Measured only if asked for: their momentum is as large as the weights or twice that."""
DEFAULT_PLACEMENTS = ("inplace", "probe", "probe-activation", "probe-scratch")

PUBLISHED_GB = {"lozo": 27.0, "lozo-m": 27.4, "mezo": 27.4, "mezo-m": 51.7}
"""Memory of a run on OPT-13B in half precision, RTE, as the authors of LOZO publish it (GB; they do not give the batch)."""
PUBLISHED_MODEL = "opt-13b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    add_model(parser, (*METHODS, *DENSE_MOMENTUM), METHODS)
    add_choice(parser, "dtype", DTYPE_NAMES, ["bfloat16", "float32"])
    add_placement(parser, DEFAULT_PLACEMENTS)
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of the forward pass (default: 32)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Measures every method in every placement.

    Raises:
        InputError: transformers is missing.
    """
    document["model"] = options.model
    on_gpu = options.device.type == "cuda"
    rows: list[Row] = []
    deadline = Deadline(options.seconds)
    batch = CausalBatch(options.tokens, options.device, MODELS[options.model].positions, options.length)
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        for entrant in entrants(options.methods, options.placement):
            if deadline.over():
                break
            progress(f"{options.model} {name} {entrant}")
            row = {"method": entrant.method, "placement": entrant.placement, "dtype": name}
            row |= {"rank": options.rank, "tokens": options.tokens}
            try:
                # A GPU may have no room for a copy, and there the values of weights change no peak.
                use = measure_method(model if on_gpu else copy.deepcopy(model), batch, entrant, options.rank)
            except RuntimeError as e:
                if not out_of_memory(e):
                    raise
                rows.append(row | {"out_of_memory": True})
                continue
            row |= {f"{key}_bytes": value for key, value in dataclasses.asdict(use).items()}
            row["extra_percent"] = round(100 * use.share, 4)
            if on_gpu and options.model == PUBLISHED_MODEL:
                row["published_gb"] = None if entrant.probing else PUBLISHED_GB.get(entrant.method)
            rows.append(row)
            save_partial(document, options.output, rows=rows)
        del model
    return {"rows": rows} | deadline.note()


def measure_method(model: nn.Module, batch: Callable[[nn.Module], Tensor], entrant: Entrant, rank: int) -> MemoryUse:
    """Measures the memory of a method of :data:`METHODS` or :data:`DENSE_MOMENTUM` on a model, which is changed.

    Args:
        batch: the loss of a model on a fixed batch; a :class:`~lozo_kernels.bench.batches.CausalBatch` where evaluations share a
            forward pass.
    """
    made: list[ZerothOrderOptimizer] = []

    def unpatch() -> None:
        while made:
            made.pop().handle.restore()

    def make_step() -> Step:
        if entrant.method.startswith("published "):
            return make_published(entrant.method.removeprefix("published "), model, rank).step
        unpatch()
        made.append(make_optimizer(entrant.method, model, rank, entrant.placement))
        step = made[0].step
        return (lambda closure: step(closure, batch.ids)) if isinstance(batch, CausalBatch) and entrant.batched else step

    def closure(*inputs: Tensor) -> Tensor:
        return batch.losses(model, *inputs) if inputs and isinstance(batch, CausalBatch) else batch(model)

    device = next(model.parameters()).device
    measure = memory_gpu.measure_memory if device.type == "cuda" else memory_cpu.measure_memory
    try:
        use = measure(model, closure, make_step, prepares=entrant.probing)
        return dataclasses.replace(use, **parts(made[0].handle)) if made else use
    finally:
        unpatch()


def parts(handle: Any) -> dict[str, int]:
    """Returns the bytes of what a probe holds, by their names in :class:`MemoryUse`. Empty for another handle."""
    if handle.moves_weights:
        return {}
    factors = [t for m in handle.members for t in (m.b, m.v, m.gain) if t is not None]
    copies = [t for m in handle.members for t in (*m.buffers, m.shift) if t is not None]
    return {
        "factor": nbytes([*factors, *handle.momentum.values()]),
        "scratch": handle.scratch_bytes,
        "copy": nbytes(copies),
    }


def render(document: Row) -> str:
    """Formats the rows as text."""
    on_gpu = any(row.get("peak_bytes") for row in document["rows"])
    sizes = ("weights", "forward", "persistent", "factor", "scratch", "extra", "first_step")
    header = ["method", "placement", "dtype", "rank", *(f"{size.replace('_', ' ')} MiB" for size in sizes), "of weights"]
    header += ["peak GB", "reserved GB", "published GB"] if on_gpu else ["resident MiB"]
    lines = []
    for row in document["rows"]:
        line = [row["method"], row["placement"], row["dtype"], str(row["rank"])]
        if "out_of_memory" in row:
            lines.append([*line, "out of memory", *[""] * (len(header) - len(line) - 1)])
            continue
        line += [mebibytes(row[f"{size}_bytes"], ".2f") for size in sizes] + [f"{row['extra_percent']:.2f}%"]
        if on_gpu:
            line += [f"{gb(row['peak_bytes']):.2f}", f"{gb(row['reserved_bytes']):.2f}", str(row.get("published_gb") or "-")]
        else:
            line.append(mebibytes(row["resident_bytes"], ".2f"))
        lines.append(line)
    return text_table([header, *lines], left=3)
