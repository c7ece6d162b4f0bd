"""``python -m bench host``: what one pass over a model costs the host in Python before a GPU has anything to do."""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lozo_kernels.bench.arguments import add_choice, positive
from lozo_kernels.bench.models import MODELS, build_model
from lozo_kernels.errors import InputError
from lozo_kernels.kernels.backends.triton import TritonBackend
from lozo_kernels.kernels.backends.triton.launcher import Launcher
from lozo_kernels.kernels.registry import registered
from lozo_kernels.model.handle import Handle
from lozo_kernels.model.patching import patch
from lozo_kernels.model.text_table import text_table

from . import host_probe, stub
from .host_probe import microseconds

TARGET = {"model": "opt-1.3b", "pass": "perturb", "microseconds": 150}
"""The project's goal for a pass with its launches left out."""
LAYER_TARGET = {"pass": "layer, activation side", "microseconds": 15}
"""The project's goal for what a probe adds after a layer, Triton's part included."""


class NoLaunch(Launcher):
    """Counts launches and makes none."""

    def run(self, plan: Any, programs: int, arguments: tuple[Any, ...]) -> None:
        pass


@contextlib.contextmanager
def stubbed_handle(model: nn.Module, **options: Any) -> Iterator[tuple[Handle, NoLaunch]]:
    """Makes a handle whose Triton backend prepares launches on the CPU but makes none. The weights are never touched."""
    launcher = NoLaunch()
    backend = TritonBackend(launcher)
    backend.name = "no launch"
    with registered(backend):
        handle = patch(model, backend=backend.name, **options)
        try:
            yield handle, launcher
        finally:
            handle.restore()


def empty_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Builds the real modules and parameters of a model in memory that is never touched, so that the system never provides it."""
    model = build_model(name, dtype, torch.device("meta")).to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    return model


def passes(handle: Handle) -> dict[str, Callable[[int], None]]:
    """Returns the passes of a step, which take the number of the step. The first one of a step also checks sizes and dtypes."""
    c = torch.tensor(0.3, dtype=torch.float64)
    return {
        "perturb, first of a step": lambda step: handle.perturb_(step, 1e-3),
        "perturb": lambda _: handle.perturb_(0, 1e-3),
        "update and restore": lambda _: handle.update_(0, c, 1e-6, applied=-1e-3),
        "update, restore and perturb": lambda _: handle.update_(0, c, 1e-6, applied=-1e-3, perturb_next=1e-3),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    add_choice(parser, "model", MODELS, "opt-1.3b", "whose parameters (default: opt-1.3b)")
    parser.add_argument("--repeats", type=positive, default=300, help="passes of each kind (default: 300)")
    probed = ("opt-1.3b", "opt-13b")
    add_choice(parser, "probed", MODELS, list(probed), f"which a probe evaluates (default: {', '.join(probed)})")


def measure(options: argparse.Namespace, document: dict[str, Any]) -> dict[str, Any]:
    """Times passes on the host.

    Raises:
        InputError: transformers or triton is missing, or kernels are interpreted.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise InputError("kernels that are interpreted are not launched as those of a GPU: unset TRITON_INTERPRET")
    document["target"], document["layer_target"] = TARGET, LAYER_TARGET
    rows = []
    with stubbed_handle(empty_model(options.model, torch.bfloat16), rank=4, interval=1 << 20) as (handle, launcher):
        for name, make in passes(handle).items():
            make(0)
            launcher.launches, seconds = 0, []
            for step in range(1, options.repeats + 1):
                start = time.process_time()
                make(step)
                seconds.append(time.process_time() - start)
            rows.append({"model": options.model, "pass": name, "tensors": len(handle.names)} | microseconds(seconds))
            rows[-1]["launches"] = launcher.launches // options.repeats
    stub.install()  # from here on
    for name in options.probed:
        rows += host_probe.rows_of(name, empty_model(name, torch.bfloat16), options.repeats)
    return {"rows": rows}


def render(document: dict[str, Any]) -> str:
    """Formats the rows as text."""
    header = ("model", "pass", "tensors", "launches", "least us", "median", "q25", "q75")
    keys = ("tensors", "launches", "least", "median", "q25", "q75")
    lines = [(r["model"], r["pass"], *(str(r.get(key, "-")) for key in keys)) for r in document["rows"]]
    return text_table([header, *lines], left=2)
