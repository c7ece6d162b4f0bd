"""The results of a run: the summary, and the table on the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ...bench.environment import commit, cpu_name, versions
from ...model.text_table import mebibytes, number
from ..loop.records import MetricsLog
from ..loop.train import Outcome
from ..methods import METHODS
from ..run import Run
from ..tables import table


def summarize(
    run: Run,
    model: nn.Module,
    outcome: Outcome,
    log: MetricsLog,
    inference_peaks: Sequence[int | None],
    comparison: dict[str, Any] | None,
) -> dict[str, Any]:
    """The machine-readable summary. A number that could not be had is None.

    Args:
        inference_peaks: most memory alive at once beyond the weights in a forward pass of each of the batches of the first steps.
        comparison: what :func:`~.beside_published.compare` returned.
    """
    steady = log.steps[min(5, len(log.steps) // 2) :]  # without the first, profiled and cold ones
    settings, method = run.settings, METHODS[run.settings.method]
    step_ms = statistics.median(r.step_ms for r in steady) if steady else None
    forwards_ms = statistics.median(r.forwards_ms for r in steady) if steady else None
    passes = method.passes(settings.directions, settings.one_sided, settings.evaluation)
    before = log.evaluations[0] if log.evaluations else None
    after = log.evaluations[-1] if len(log.evaluations) > 1 else None
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    peak = None if outcome.peak_bytes is None else weight_bytes + outcome.peak_bytes
    # Of the batches whose steps were measured, and of no other: a longer one takes more memory in either.
    forwards = [p for p in inference_peaks[: outcome.measured_steps] if p is not None]
    inference = weight_bytes + max(forwards) if forwards else None
    if comparison is not None and outcome.measured_steps < len(inference_peaks):
        comparison = comparison | {"published_training_peak_bytes": None}
    return {
        "model": run.model_name,
        "method": settings.method,
        "task": settings.task,
        "objective": run.objective.name,
        "loss_unit": run.objective.unit,
        "settings": settings.to_dict(),
        "seed": settings.seed,
        "data": _data(run),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "steps_done": outcome.steps_done,
        "stopped": outcome.stopped,
        "loss_before": before and before.loss,
        "loss_after": after and after.loss,
        "accuracy_before": before and before.accuracy,
        "accuracy_after": after and after.accuracy,
        "learning_rate": log.steps[-1].lr if log.steps else None,
        "evaluations": [dataclasses.asdict(e) for e in log.evaluations],
        "skipped_updates": log.skipped,
        "train_seconds": outcome.seconds,
        "step_ms": step_ms,
        "forwards_ms": forwards_ms,
        "two_forwards_ms": 2 * forwards_ms / passes if forwards_ms and method.forwards == 2 else None,
        "outside_forwards": None if not step_ms or forwards_ms is None else 1 - forwards_ms / step_ms,
        "weight_bytes": weight_bytes,
        "inference_peak_bytes": inference,
        "training_peak_bytes": peak,
        "training_peak_over_inference": None if peak is None or not inference else peak / inference,
        "published": comparison,
        "device": f"{run.device} ({torch.cuda.get_device_name(run.device) if run.device.type == 'cuda' else cpu_name()})",
        "threads": torch.get_num_threads(),
        "backends": outcome.backends,
        "versions": versions(),
        "commit": commit(),
    }


def _data(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = {"source": run.data.source, "train_examples": len(run.train_set), "dev_examples": len(run.dev_set)}
    return found | ({"classes": run.data.counts()} if run.data.counts() else {})


def render_summary(summary: dict[str, Any]) -> str:
    """The summary for a reader."""
    s, settings = summary, summary["settings"]
    method = METHODS[s["method"]]
    names = [name for name in ("rank", "interval", "eps") if name in method.uses] + ["lr"]
    details = ", ".join(f"{name} {_setting(s, name)}" for name in names)
    if settings["momentum"]:
        details += f", momentum {settings['momentum']:g}"
    scores = [["", "before", "after"]]
    scores.append([f"dev loss per {s['loss_unit']}", *(number(s[key], ".4f") for key in ("loss_before", "loss_after"))])
    if s["accuracy_before"] is not None:
        scores.append(["dev accuracy", *(number(s[key], ".1%") for key in ("accuracy_before", "accuracy_after"))])
    lines = [
        f"model: {s['model']}, {s['parameters']:,} parameters",
        f"{s['task'] or s['data']['source']} ({s['objective']}), {s['method']}: {details}, seed {s['seed']}",
        f"{s['steps_done']} steps in {s['train_seconds']:.0f} s on {s['device']}, "
        f"{s['data']['train_examples']} train and {s['data']['dev_examples']} dev examples",
        "",
        table(scores),
    ]
    if s.get("test"):
        scored = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in s["test"]["metrics"].items())
        lines.append(f"{s['test']['examples']} test examples, after: {scored or format(s['test']['loss'], '.4f')}")
    one_sided, evaluation = settings.get("one_sided", False), settings.get("evaluation", "sequential")  # earlier runs have none
    lines += ["", table(_costs(s, method.passes(settings["directions"], one_sided, evaluation))), ""]
    lines += [f"note: {note}" for note in s["notes"]]
    lines.append(f"saved in {s['output']}: model/, metrics.jsonl, summary.json, loss.png")
    if s["stopped"]:
        lines.append(f"stopped early: {s['stopped']}")
    return "\n".join(lines)


def _setting(summary: dict[str, Any], name: str) -> str:
    """A setting; a learning rate that found itself with what it was in the last step."""
    value = summary["settings"][name]
    return format(value, "g") if value is not None else f"auto ({number(summary.get('learning_rate'), '.3g')} at the end)"


def _costs(summary: dict[str, Any], forwards: int) -> list[list[str]]:
    """Time and memory of a step of so many forward passes, beside those of the published way where it was timed."""
    published, inference = summary["published"], summary["inference_peak_bytes"]
    # In a comparison, both columns are from its interleaved rounds, so that they saw the same machine.
    step_ms, forwards_ms = (summary[key] for key in ("step_ms", "forwards_ms"))
    if published:
        step_ms, forwards_ms = published["step_ms"], published["two_forwards_ms"]
    columns = [("this library", step_ms, summary["training_peak_bytes"])]
    if published:
        columns.append(("published way", published["published_step_ms"], published["published_training_peak_bytes"]))
    passes = {1: "one", 2: "two", 4: "four"}.get(forwards, str(forwards))
    heads = [
        "",
        "time per step, ms",
        f"{passes} forward pass{'es' if forwards > 1 else ''}, ms",
        "share of the step beyond them",
        "peak memory, MiB",
        "inference alone, MiB",
        "peak memory beyond inference",
    ]

    def cells(name: str, ms: float | None, peak: int | None) -> list[str]:
        # A step that is faster than these passes, as one batched evaluation can be, has no share beyond them.
        beyond = None if not ms or forwards_ms is None or ms < forwards_ms else 1 - forwards_ms / ms
        over = None if peak is None or not inference else peak / inference - 1
        times = [number(ms, ".2f"), number(forwards_ms, ".2f"), number(beyond, ".0%")]
        return [name, *times, mebibytes(peak, ".2f"), mebibytes(inference, ".2f"), number(over, "+.1%")]

    return [list(row) for row in zip(heads, *itertools.starmap(cells, columns), strict=True)]
