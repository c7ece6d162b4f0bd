"""The results of a run: the summary, the table on the terminal and the plot."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch

from ...bench.environment import commit, cpu_name, versions
from ...errors import require
from ..loop.records import MetricsLog
from ..loop.train import Outcome
from ..methods import METHODS
from ..settings import Settings
from .beside_published import Comparison


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a report is made of.

    Attributes:
        settings: resolved.
        objective, loss_unit: what was minimised, and what the loss is a mean over.
        source: where the examples came from; ``train_examples`` and ``dev_examples`` are how many were used.
        weight_bytes: of the model; ``forward_bytes``: most memory alive at once in one forward pass beyond them.
        notes: what the user should know.
    """

    settings: Settings
    objective: str
    loss_unit: str
    source: str
    train_examples: int
    dev_examples: int
    parameters: int
    trained_parameters: int
    weight_bytes: int
    forward_bytes: int | None
    device: torch.device
    notes: list[str]
    command: str
    output: Path


def summarize(run: Run, outcome: Outcome, log: MetricsLog, comparison: Comparison | None) -> dict[str, Any]:
    """The machine-readable summary. A number that could not be had is None."""
    steady = log.steps[min(5, len(log.steps) // 2) :]  # without the first, profiled and cold ones
    method = METHODS[run.settings.method]
    step_ms = statistics.median(r.step_ms for r in steady) if steady else None
    forwards_ms = statistics.median(r.forwards_ms for r in steady) if steady else None
    before = log.evaluations[0] if log.evaluations else None
    after = log.evaluations[-1] if len(log.evaluations) > 1 else None
    peak = None if outcome.peak_bytes is None else run.weight_bytes + outcome.peak_bytes
    inference = None if run.forward_bytes is None else run.weight_bytes + run.forward_bytes
    summary: dict[str, Any] = {
        "method": run.settings.method,
        "task": run.settings.task,
        "objective": run.objective,
        "loss_unit": run.loss_unit,
        "settings": run.settings.to_dict(),
        "seed": run.settings.seed,
        "data": {"source": run.source, "train_examples": run.train_examples, "dev_examples": run.dev_examples},
        "parameters": run.parameters,
        "trained_parameters": run.trained_parameters,
        "steps_done": outcome.steps_done,
        "stopped": outcome.stopped,
        "loss_before": before and before.loss,
        "loss_after": after and after.loss,
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "evaluations": [dataclasses.asdict(e) for e in log.evaluations],
        "skipped_updates": log.skipped,
        "train_seconds": outcome.seconds,
        "step_ms": step_ms,
        "forwards_ms": forwards_ms,
        "two_forwards_ms": forwards_ms / run.settings.directions if forwards_ms and method.forwards == 2 else None,
        "outside_forwards": None if not step_ms or forwards_ms is None else 1 - forwards_ms / step_ms,
        "weight_bytes": run.weight_bytes,
        "inference_peak_bytes": inference,
        "training_peak_bytes": peak,
        "training_peak_over_inference": None if peak is None or not inference else peak / inference,
        "published": None if comparison is None else _published(run, comparison),
        "device": _device_name(run.device),
        "threads": torch.get_num_threads(),
        "backends": outcome.backends,
        "versions": versions(),
        "commit": commit(),
        "notes": run.notes,
        "command": run.command,
        "output": str(run.output),
    }
    return summary


def _published(run: Run, comparison: Comparison) -> dict[str, Any]:
    peak = comparison.published_peak_bytes
    return {
        "rounds": comparison.rounds,
        "two_forwards_ms": comparison.two_forwards_ms,
        "step_ms": comparison.step_ms,
        "published_step_ms": comparison.published_step_ms,
        "published_training_peak_bytes": None if peak is None else run.weight_bytes + peak,
    }


def table(summary: dict[str, Any]) -> str:
    """The summary for a reader."""
    s, settings = summary, summary["settings"]
    method = METHODS[s["method"]]
    names = [name for name in ("rank", "interval", "eps") if name in method.uses] + ["lr"]
    details = ", ".join(f"{name} {settings[name]:g}" for name in names)
    if settings["momentum"]:
        details += f", momentum {settings['momentum']:g}"
    lines = [
        f"{s['task'] or s['data']['source']} ({s['objective']}), {s['method']}: {details}, seed {s['seed']}",
        f"{s['steps_done']} steps in {s['train_seconds']:.0f} s, {s['parameters']:,} parameters on {s['device']}, "
        f"{s['data']['train_examples']} train and {s['data']['dev_examples']} dev examples",
        "",
        f"{'':34}{'before':>14}{'after':>14}",
        f"{'dev loss per ' + s['loss_unit']:34}{_number(s['loss_before'], '.4f'):>14}{_number(s['loss_after'], '.4f'):>14}",
    ]
    if s["accuracy_before"] is not None:
        lines.append(f"{'dev accuracy':34}{_number(s['accuracy_before'], '.1%'):>14}{_number(s['accuracy_after'], '.1%'):>14}")
    if s.get("test"):
        scored = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in s["test"]["metrics"].items())
        lines.append(f"{s['test']['examples']} test examples, after: {scored or format(s['test']['loss'], '.4f')}")
    published = s["published"]
    # In a comparison, both columns are from its interleaved rounds, so that they saw the same machine.
    step, forwards = (published["step_ms"], published["two_forwards_ms"]) if published else (s["step_ms"], s["forwards_ms"])
    count = method.forwards * settings["directions"]
    passes = {1: "one", 2: "two", 4: "four"}.get(count, str(count))
    inference = s["inference_peak_bytes"]
    columns = [(step, s["training_peak_bytes"])]
    if published:
        columns.append((published["published_step_ms"], published["published_training_peak_bytes"]))
    heads = ["this library", "published way"][: len(columns)]
    rows: list[tuple[str, list[str]]] = [
        ("time per step, ms", [_number(ms, ".2f") for ms, _ in columns]),
        (f"{passes} forward pass{'es' if count > 1 else ''}, ms", [_number(forwards, ".2f") for _ in columns]),
        ("share of the step beyond them", [_number(_beyond(ms, forwards), ".0%") for ms, _ in columns]),
        ("peak memory, MiB", [_mebibytes(peak) for _, peak in columns]),
        ("inference alone, MiB", [_mebibytes(inference) for _ in columns]),
        ("peak memory beyond inference", [_number(_ratio(peak, inference), "+.1%") for _, peak in columns]),
    ]
    lines += ["", f"{'':34}" + "".join(f"{head:>14}" for head in heads)]
    lines += [f"{name:34}" + "".join(f"{cell:>14}" for cell in cells) for name, cells in rows]
    lines += [""] + [f"note: {note}" for note in s["notes"]]
    lines.append(f"saved in {s['output']}: model/, metrics.jsonl, summary.json, loss.png")
    if s["stopped"]:
        lines.append(f"stopped early: {s['stopped']}")
    return "\n".join(lines)


def plot(path: Path, log: MetricsLog, title: str) -> None:
    """Training loss (every step, and smoothed), dev loss and dev accuracy over steps, as a PNG."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    steps, losses = [r.step + 1 for r in log.steps], [r.loss for r in log.steps]
    axis.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
    axis.plot(steps, smoothed(losses), color="tab:blue", label="train loss (smoothed)")
    at = [e.step for e in log.evaluations]
    accuracies = [e.accuracy for e in log.evaluations if e.accuracy is not None]
    axis.plot(at, [e.loss for e in log.evaluations], "o-", color="tab:orange", label="dev loss")
    axis.set(xlabel="step", ylabel="loss", title=title)
    lines, labels = axis.get_legend_handles_labels()
    if accuracies:
        right = axis.twinx()
        right.plot(at, accuracies, "s--", color="tab:green", label="dev accuracy")
        right.set(ylabel="accuracy", ylim=(0, 1.02))
        more = right.get_legend_handles_labels()
        lines, labels = lines + more[0], labels + more[1]
    axis.legend(lines, labels, loc="best")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def smoothed(values: list[float], keep: float = 0.95) -> list[float]:
    """Exponential average without the bias of its start."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if value == value:  # skipped steps have a NaN loss
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else float("nan"))
    return out


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else f"{device} ({cpu_name()})"


def _beyond(step: float | None, forwards: float | None) -> float | None:
    return None if not step or forwards is None else max(0.0, 1 - forwards / step)


def _ratio(peak: int | None, inference: int | None) -> float | None:
    return None if peak is None or not inference else peak / inference - 1


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None or value != value else format(value, spec)


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.2f}"
