"""``python -m bench fits``: finds out whether a model and a step fit into a device, and what they take."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lozo_kernels.bench.arguments import DTYPE_NAMES, add_choice, add_model, positive
from lozo_kernels.bench.batches import CausalBatch
from lozo_kernels.bench.deadline import Deadline
from lozo_kernels.bench.document import first_line, gb, progress, save_partial
from lozo_kernels.bench.entrants import METHODS, make_optimizer
from lozo_kernels.bench.memory_use import out_of_memory
from lozo_kernels.bench.models import MODELS, build_model
from lozo_kernels.model.text_table import number, text_table

Row = dict[str, Any]

_STEPS = 2  # the second is timed; the first loads code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this measurement."""
    add_model(parser, METHODS, ["lozo"], model="opt-66b")
    add_choice(parser, "dtype", DTYPE_NAMES, "bfloat16")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of a batch (default: 512)")


def measure(options: argparse.Namespace, document: Row) -> Row:
    """Tries it. Running out of memory is a result, not an error.

    Raises:
        InputError: transformers is missing.
    """
    document |= {"model": options.model, "dtype": options.dtype, "tokens": options.tokens}
    progress(f"{options.model} {options.dtype}: weights")
    attempt = Attempt(options.device)
    torch.manual_seed(0)
    model = attempt.run("weights", lambda: build_model(options.model, DTYPE_NAMES[options.dtype], options.device))
    if model is None:
        return {"rows": [{"method": method} | attempt.result() for method in options.methods]}
    document["weights_bytes"] = sum(p.numel() * p.element_size() for p in model.parameters())
    forward = CausalBatch(options.tokens, options.device, MODELS[options.model].positions, options.length)
    rows: list[Row] = []
    deadline = Deadline(options.seconds)
    for method in options.methods:
        if deadline.over():
            break
        rows.append({"method": method} | try_steps(model, forward, method, options.rank))
        save_partial(document, options.output, rows=rows)
    return {"rows": rows} | deadline.note()


class Attempt:
    """Runs phases that may run out of memory, and keeps what they took until then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.failed_at: str | None = None
        self.error: str | None = None
        self.seconds: dict[str, float] = {}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def run(self, phase: str, call: Callable[[], Any]) -> Any:
        """Returns what the call returns, or None if memory ran out now or in an earlier phase."""
        if self.failed_at is not None:
            return None
        start = time.perf_counter()
        try:
            result = call()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError as e:
            if not out_of_memory(e):
                raise
            self.failed_at, self.error = phase, first_line(e)
            return None
        self.seconds[phase] = round(time.perf_counter() - start, 4)
        return result

    def result(self) -> Row:
        """Returns the columns of a row: whether all phases fitted, which did not, and the peaks of torch's allocator on a GPU."""
        row: Row = {"fits": self.failed_at is None, "failed_at": self.failed_at, "error": self.error, "seconds": self.seconds}
        on_gpu = self.device.type == "cuda"
        row["peak_bytes"] = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        row["reserved_bytes"] = torch.cuda.max_memory_reserved(self.device) if on_gpu else None
        return row


def try_steps(model: nn.Module, forward: Callable[[nn.Module], Tensor], method: str, rank: int) -> Row:
    """Tries a forward pass, then steps of a method, on a model that is already on its device."""
    attempt = Attempt(next(model.parameters()).device)
    progress(f"forward, then steps of {method}")

    def forward_pass() -> Tensor:
        with torch.no_grad():
            return forward(model)

    attempt.run("forward", forward_pass)
    optimizer = attempt.run("optimizer", lambda: make_optimizer(method, model, rank))
    for i in range(_STEPS):
        attempt.run(f"step {i}", lambda: optimizer.step(lambda: forward(model)))
    row = attempt.result()
    if optimizer is not None:
        optimizer.handle.restore()
    gc.collect()
    return row


def render(document: Row) -> str:
    """Formats the rows as text."""
    header = ("model", "method", "fits", "fails at", "peak GB", "reserved GB", "device GB", "step s")
    memory = document.get("gpu", {}).get("memory_bytes")
    lines = [
        (
            document["model"],
            row["method"],
            "yes" if row["fits"] else "no",
            row["failed_at"] or "-",
            number(row["peak_bytes"] and gb(row["peak_bytes"]), ".2f"),
            number(row["reserved_bytes"] and gb(row["reserved_bytes"]), ".2f"),
            number(memory and gb(memory), ".2f"),
            str(row["seconds"].get(f"step {_STEPS - 1}", "-")),
        )
        for row in document["rows"]
    ]
    return text_table([header, *lines], left=4)
