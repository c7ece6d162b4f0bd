"""Peak memory of a step of every method on one model: what ``reproduce --table memory`` measures."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...bench.memory_use import out_of_memory
from ...bench.models import MODELS, build_model
from ...errors import InputError, require
from ..loop.building import build_driver
from ..loop.drivers import Closure
from ..measure import forward_peak, peak_memory
from ..methods import METHODS
from ..models.pretrained import read_pretrained
from ..reports.plots import plot_memory
from ..settings import Settings
from .scales import Request, Row

INFERENCE = "inference"
STEPS = 2
"""Steps that are measured: some optimisers make their state at the end of the first."""


def token_loss(model: nn.Module, sequences: int, length: int) -> Closure:
    """The loss of a causal model on random tokens, which are the same for every model."""
    generator = torch.Generator().manual_seed(0)
    most = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
    ids = torch.randint(4, min(most, 1000), (sequences, length), generator=generator, dtype=torch.int64, device="cpu").to(
        _device(model)
    )
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]


def open_model(name: str, dtype: torch.dtype, device: torch.device, *, trusted: bool = False) -> nn.Module:
    """A causal model: with random weights for a name of the benchmarks' architectures, otherwise from a folder or the Hub.

    Args:
        trusted: run Python code that comes with it.

    Raises:
        InputError: there is no such model.
    """
    torch.manual_seed(0)
    if name in MODELS:
        return build_model(name, dtype, device)
    what = f"causal model, nor an architecture of {', '.join(MODELS)},"
    loader = require("transformers").AutoModelForCausalLM
    model: nn.Module = read_pretrained(loader, name, what, trusted=trusted, dtype=dtype)
    return model.to(device).eval()


def measure_inference(model: nn.Module, closure: Closure) -> Row:
    """Measures a forward pass without a graph: a row with the weights and the peak beyond them, in bytes."""
    return _row(INFERENCE, model, forward_peak(closure, _device(model)))


def measure_method(name: str, model: nn.Module, closure: Closure, settings: dict[str, Any]) -> Row:
    """Measures how a method's driver is made and takes its first steps, beyond the model's bare weights, to which its updates go.

    Args:
        name: the name of a method that trains.
        settings: fields of :class:`~lozo_kernels.hf.settings.Settings` beside the method and the learning rate.

    Returns:
        A row like that of :func:`measure_inference`; where the device has no room, it has ``out_of_memory`` and no peak.
    """
    method = METHODS[name]
    options = {"lr": method.lr * 1e-3, "momentum": method.momentum} | settings  # so small that no weight leaves its range
    gc.collect()
    driver = None
    try:
        with peak_memory(_device(model)) as memory:
            driver = build_driver(model, Settings(method=name, **options))
            for _ in range(STEPS):
                driver.step([closure])
        return _row(name, model, memory.bytes)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        return _row(name, model, None) | {"out_of_memory": True}
    finally:
        if driver is not None:
            driver.close()
        del driver
        if _device(model).type == "cuda":
            torch.cuda.empty_cache()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _row(name: str, model: nn.Module, beyond: int | None) -> Row:
    weights = sum(p.numel() * p.element_size() for key, p in model.named_parameters() if "lora_" not in key)
    return {
        "method": name,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "weights_bytes": weights,
        "beyond_weights_bytes": beyond,
        "peak_bytes": None if beyond is None else weights + beyond,
    }


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with their peaks in times of inference and of the weights, each beside inference in the same dtype."""
    base = {row["dtype"]: row["peak_bytes"] for row in rows if row["method"] == INFERENCE}
    found = []
    for row in rows:
        peak, inference = row["peak_bytes"], base.get(row["dtype"])
        known = peak is not None and inference
        ratios = {
            "over_inference": round(peak / inference, 4) if known else None,
            "over_weights": round(peak / row["weights_bytes"], 4) if peak is not None else None,
        }
        found.append(row | ratios)
    return found


def measure_memory(request: Request, device: torch.device, output: Path) -> Row:
    """Measures the methods on one model for each dtype.

    Returns:
        What the document holds of it; memory.png is left in the output folder.
    """
    scale = request.size
    name = request.model or scale.architecture
    assert name is not None
    recipes = request.paper.recipes
    dtypes: dict[str, list[str]] = {}
    for method in request.methods or recipes:
        if METHODS[method].trains:
            dtypes.setdefault(request.chosen_dtype(method, device), []).append(method)
    rows: list[Row] = []
    parameters = 0
    for dtype, methods in dtypes.items():
        model = open_model(name, getattr(torch, dtype), device, trusted=request.trust_remote_code)
        parameters = sum(p.numel() for p in model.parameters())
        request.say(f"{name} {dtype}: {INFERENCE}")
        closure = token_loss(model, 1, scale.length)
        rows.append(measure_inference(model, closure))
        for method in methods:
            request.say(f"{name} {dtype}: {method}")
            settings = recipes[method].settings if method in recipes else {}
            rows.append(measure_method(method, model, closure, {"seed": request.seed, **settings}))
        del model, closure
    if not rows:
        raise InputError("--methods: none of them trains, so there is no memory to measure")
    rows = with_ratios(rows)
    label = f"{name} architecture with random weights" if name in MODELS else name
    plot_memory(rows, f"{label}, one sequence of {scale.length} tokens", output / "memory.png")
    return {
        "model": label,
        "model_label": f"{label}, {parameters / 1e6:.2f}M parameters",
        "tokens": scale.length,
        "notes": [
            f"a batch of one sequence of {scale.length} random tokens; the published columns have batches of their tasks",
            "peak: the weights and the most tensors alive at once in the making of the method and its first two steps",
        ],
        "targets": judge(rows),
        "rows": rows,
    }


def judge(rows: Sequence[Row]) -> list[Row]:
    """The relations that the papers' table shows, and whether the measured rows have them."""
    peak = {row["method"]: row["peak_bytes"] for row in rows if row["peak_bytes"]}
    weights = {row["method"]: row["weights_bytes"] for row in rows}
    checks: list[tuple[str, float | None, float, float]] = [
        ("LOZO in times of inference", _ratio(peak, "lozo", INFERENCE), 0.0, 1.02),
        ("LOZO-M in times of LOZO", _ratio(peak, "lozo-m", "lozo"), 0.0, 1.01),
        ("MeZO in times of inference", _ratio(peak, "mezo", INFERENCE), 0.0, 1.02),
        ("FT (AdamW) in times of inference", _ratio(peak, "ft-adamw", INFERENCE), 3.0, float("inf")),
    ]
    if "mezo-m" in peak and "mezo" in peak:
        beyond = (peak["mezo-m"] - peak["mezo"]) / weights["mezo"]
        checks.append(("MeZO-M beyond MeZO, in times of the weights", beyond, 0.95, 2.05))  # its momentum is fp32
    return [
        {"name": name, "value": round(value, 4), "least": least, "most": None if most == float("inf") else most}
        | {"met": least <= value <= most}
        for name, value, least, most in checks
        if value is not None
    ]


def _ratio(peak: dict[str, int], a: str, b: str) -> float | None:
    return peak[a] / peak[b] if a in peak and b in peak else None
