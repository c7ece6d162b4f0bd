"""``lozo-kernels bench memory``: what a step needs beyond the weights and the memory of its forward passes."""

from __future__ import annotations

import argparse
import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import handle_of
from ..environment import OtherLoad
from . import memory_cpu, memory_gpu
from .arguments import DTYPE_NAMES, add_common, add_model, check_output, positive
from .document import format_table, progress, publish, save_partial, where
from .memory_use import MemoryUse, Step, out_of_memory
from .models import MODELS, build_model
from .step import add_length, causal_forward, make_optimizer, make_published
from .targets import PUBLISHED_MEMORY_GB, PUBLISHED_MEMORY_MODEL, gb, goals, judge_extra_memory, judge_peak_memory

Row = dict[str, Any]

METHODS = ("lozo", "lozo-fused", "lozo-m", "mezo", "published lozo", "published lozo-m", "published mezo")
DENSE_MOMENTUM = ("mezo-m", "published mezo-m")
"""Measured only if asked for: their momentum is as large as the weights or twice that."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this measurement."""
    add_common(parser)
    add_model(parser, (*METHODS, *DENSE_MOMENTUM), METHODS)
    parser.add_argument("--tokens", type=positive, default=32, help="tokens of the forward pass (default: 32)")
    add_length(parser)


def run(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Measures and prints.

    Raises:
        InputError: transformers is missing, or the result cannot be written.
    """
    check_output(options.output)
    document = where(options.device, argv)
    others = OtherLoad()
    document["model"] = options.model
    on_gpu = options.device.type == "cuda"
    rows: list[Row] = []
    forward = causal_forward(options.tokens, options.device, MODELS[options.model].positions, options.length)
    for name in options.dtype:
        torch.manual_seed(0)
        model = build_model(options.model, DTYPE_NAMES[name], options.device)
        for method in options.methods:
            progress(f"{options.model} {name} {method}")
            row = {"method": method, "dtype": name, "rank": options.rank, "tokens": options.tokens}
            try:
                # A GPU may have no room for a copy, and there the values of weights change no peak.
                use = measure_method(model if on_gpu else copy.deepcopy(model), forward, method, options.rank)
            except RuntimeError as e:
                if not out_of_memory(e):
                    raise
                rows.append(row | {"out_of_memory": True})
                continue
            row |= {f"{key}_bytes": value for key, value in dataclasses.asdict(use).items()}
            row["extra_percent"] = round(100 * use.share, 4)
            if on_gpu and options.model == PUBLISHED_MEMORY_MODEL:
                row["published_gb"] = PUBLISHED_MEMORY_GB.get(method)
            rows.append(row)
            save_partial(document, options.output, rows=rows)
        del model
    document["cpus_used_by_others"] = others.mean()
    measured = [row for row in rows if "out_of_memory" not in row]
    targets = judge_peak_memory(measured, options.model) if on_gpu else judge_extra_memory(measured)
    publish(document | {"targets": targets, "rows": rows}, render, as_json=options.json, output=options.output)
    return 0


def measure_method(model: nn.Module, forward: Callable[[nn.Module], Tensor], method: str, rank: int) -> MemoryUse:
    """Memory use of a method of :data:`METHODS` or :data:`DENSE_MOMENTUM` on a model, which is changed.

    Args:
        forward: the loss of a model on a fixed batch.
    """

    def unpatch() -> None:
        patched = handle_of(model)
        if patched is not None:
            patched.restore()

    def make_step() -> Step:
        if method.startswith("published "):
            return make_published(method.removeprefix("published "), model, rank).step
        unpatch()
        return make_optimizer(method, model, rank).step

    device = next(model.parameters()).device
    measure = memory_gpu.measure_memory if device.type == "cuda" else memory_cpu.measure_memory
    try:
        return measure(model, lambda: forward(model), make_step)
    finally:
        unpatch()


def render(document: Row) -> str:
    """The rows and the targets as text."""

    def mib(value: int | None) -> str:
        return "-" if value is None else f"{value / 2**20:.2f}"

    on_gpu = any(row.get("peak_bytes") for row in document["rows"])
    sizes = ("weights", "forward", "persistent", "extra")
    header = ["method", "dtype", "rank", *(f"{size} MiB" for size in sizes), "of weights"]
    header += ["peak GB", "reserved GB", "published GB"] if on_gpu else ["resident MiB"]
    lines = []
    for row in document["rows"]:
        line = [row["method"], row["dtype"], str(row["rank"])]
        if "out_of_memory" in row:
            lines.append([*line, "out of memory", *[""] * (len(header) - len(line) - 1)])
            continue
        line += [mib(row[f"{size}_bytes"]) for size in sizes] + [f"{row['extra_percent']:.2f}%"]
        if on_gpu:
            line += [f"{gb(row['peak_bytes']):.2f}", f"{gb(row['reserved_bytes']):.2f}", str(row.get("published_gb") or "-")]
        else:
            line.append(mib(row["resident_bytes"]))
        lines.append(line)
    return format_table(header, lines, left=2) + goals(document)
