"""Pictures of one run, and of several side by side: losses and scores, memory, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError, require
from ...model.text_table import mebibytes, number
from ..loop.records import EvalRecord, MetricsLog, StepRecord, read_metrics
from ..models.checkpoint import EMBEDDED
from ..output import make_folder, read_object
from ..tables import table
from .pictures import figure

Row = dict[str, Any]
_COUNTS = ("steps_done", "weight_bytes")
_FIGURES = (
    *("loss_before", "loss_after", "accuracy_before", "accuracy_after", "step_ms", "forwards_ms"),
    *("training_peak_bytes", "training_peak_over_inference"),
)
"""What a comparison shows of a summary; figures may be null."""


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, read back from its folder.

    Attributes:
        label: its name in a legend.
        summary: what :func:`lozo_kernels.hf.reports.summary.summarize` returned.
        steps, evaluations: the lines of metrics.jsonl.
    """

    label: str
    summary: Row
    steps: list[StepRecord]
    evaluations: list[EvalRecord]

    @property
    def seconds(self) -> list[float]:
        """Time in steps, without evaluations, at the end of each step."""
        return list(itertools.accumulate(record.step_ms / 1e3 for record in self.steps))


def read_run(folder: Path) -> RunRecord:
    """What ``finetune`` left in a folder.

    Raises:
        InputError: there is no whole run.
    """
    for name in ("metrics.jsonl", "summary.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no finished run: there is no {name}")
    summary, records = read_object(folder / "summary.json"), [record for _, record in read_metrics(folder / "metrics.jsonl")]
    odd = [name for name in (*_COUNTS, *_FIGURES) if not _isfigure(summary.get(name), needed=name in _COUNTS)]
    if odd or not isinstance(summary.get("method"), str):
        raise InputError(f"{folder}: not the files of a run: summary.json does not say {(odd or ['method'])[0]}")
    steps = [record for record in records if isinstance(record, StepRecord)]
    evaluations = [record for record in records if isinstance(record, EvalRecord)]
    return RunRecord(f"{summary['method']} ({folder.name})", summary, steps, evaluations)


def _isfigure(value: Any, *, needed: bool) -> bool:
    """Whether a value of a summary can be shown: a number that fp64 holds, or null where it is not needed."""
    return (value is None and not needed) or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def compare_runs(folders: Sequence[Path], output: Path) -> tuple[str, list[Path]]:
    """Writes curves.png and costs.png of runs into a folder.

    Returns:
        A table of the runs, and the files.

    Raises:
        InputError: a folder holds no run, or matplotlib is missing.
    """
    runs = [read_run(folder) for folder in folders]
    require("matplotlib")
    make_folder(output)
    files = [output / "curves.png", output / "costs.png"]
    for path, draw in zip(files, (_draw_curves, _draw_costs), strict=True):
        draw(runs, path)
    return runs_table(runs), files


def runs_table(runs: Sequence[RunRecord]) -> str:
    """One line a run: where it began and ended, and what it cost."""
    header = (
        "run",
        "model",
        "steps",
        "loss before",
        "after",
        "score before",
        "after",
        "ms/step",
        "peak MiB",
        "in times of inference",
    )
    rows: list[tuple[str, ...]] = [header]
    for run in runs:
        s = run.summary
        losses = [number(s[key], ".4f") for key in ("loss_before", "loss_after")]
        scores = [number(s[key], ".1%") for key in ("accuracy_before", "accuracy_after")]
        costs = [number(s["step_ms"], ".2f"), mebibytes(s["training_peak_bytes"]), number(s["training_peak_over_inference"], ".3f")]
        model = s.get("model") or s["settings"]["model"] or EMBEDDED
        model = Path(model).name if Path(model).exists() else model
        rows.append((run.label, model, str(s["steps_done"]), *losses, *scores, *costs))
    return table(rows)


def plot_losses(path: Path, log: MetricsLog, title: str) -> None:
    """Training loss (every step, and smoothed), dev loss and dev accuracy of a run over steps, as a PNG; below them the learning
    rate, if it is not always the same."""
    steps, losses = [r.step + 1 for r in log.steps], [r.loss for r in log.steps]
    rates = [r.lr for r in log.steps]
    varies = len(set(rates)) > 1
    grid = {"nrows": 2, "height_ratios": (3, 1), "sharex": True} if varies else {}
    with figure(path, figsize=(8, 6 if varies else 4.5), **grid) as axes:
        axis = axes[0] if varies else axes
        if varies:
            axes[1].plot(steps, rates, color="tab:purple")
            axes[1].set(xlabel="step", ylabel="learning rate")
        axis.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.8)
        axis.plot(steps, smoothed(losses), color="tab:blue", label="train loss (smoothed)")
        at = [e.step for e in log.evaluations]
        accuracies = [e.accuracy for e in log.evaluations if e.accuracy is not None]
        axis.plot(at, [e.loss for e in log.evaluations], "o-", color="tab:orange", label="dev loss")
        axis.set(xlabel="" if varies else "step", ylabel="loss", title=title)
        lines, labels = axis.get_legend_handles_labels()
        if accuracies:
            right = axis.twinx()
            right.plot(at, accuracies, "s--", color="tab:green", label="dev accuracy")
            right.set(ylabel="accuracy", ylim=(0, 1.02))
            more = right.get_legend_handles_labels()
            lines, labels = lines + more[0], labels + more[1]
        axis.legend(lines, labels, loc="best")


def plot_memory(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the peak memory of methods (rows of :mod:`~lozo_kernels.hf.papers.memory`), with the weights in each, as a PNG."""
    rows = [row for row in rows if row["peak_bytes"] is not None]
    with figure(path, figsize=(8, 4.5)) as axis:
        names = [row["method"] for row in rows]
        _memory_bars(axis, names, [row["weights_bytes"] for row in rows], [row["peak_bytes"] for row in rows])
        axis.set(title=title)


def smoothed(values: Sequence[float], keep: float = 0.95) -> list[float]:
    """Exponential average without the bias of its start; NaN values, which skipped steps have, are passed over."""
    out, total, weight = [], 0.0, 0.0
    for value in values:
        if value == value:
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        out.append(total / weight if weight else float("nan"))
    return out


def _draw_curves(runs: Sequence[RunRecord], path: Path) -> None:
    with figure(path, 2, 2, figsize=(11, 7)) as axes:
        for run in runs:
            steps, seconds = [record.step + 1 for record in run.steps], run.seconds
            losses = smoothed([record.loss for record in run.steps])
            at = [0.0, *seconds]
            scored = [e for e in run.evaluations if e.accuracy is not None]
            color = axes[0, 0].plot(steps, losses, label=run.label, linewidth=1)[0].get_color()
            axes[0, 1].plot(seconds, losses, color=color, linewidth=1)
            scores = [e.accuracy for e in scored]
            axes[1, 0].plot([e.step for e in scored], scores, "o-", color=color, markersize=3)
            axes[1, 1].plot([at[min(e.step, len(seconds))] for e in scored], scores, "o-", color=color, markersize=3)
        for column, x in enumerate(("step", "seconds in steps")):
            axes[0, column].set(xlabel=x, ylabel="train loss (smoothed)")
            axes[1, column].set(xlabel=x, ylabel="dev accuracy")
        axes[0, 0].legend(fontsize=8)


def _draw_costs(runs: Sequence[RunRecord], path: Path) -> None:
    labels = [run.label for run in runs]
    forwards = [run.summary["forwards_ms"] or 0.0 for run in runs]
    beyond = [max(0.0, (run.summary["step_ms"] or 0.0) - f) for run, f in zip(runs, forwards, strict=True)]
    known = [run for run in runs if run.summary["training_peak_bytes"] is not None]
    weights, peaks = ([run.summary[key] for run in known] for key in ("weight_bytes", "training_peak_bytes"))
    with figure(path, 1, 2, figsize=(11, 4.5)) as (time, memory):
        time.barh(labels, forwards, label="forward passes")
        time.barh(labels, beyond, left=forwards, label="the rest: backward, passes over the weights")
        time.set(xlabel="ms per step", title="where the time of a step goes")
        time.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
        time.invert_yaxis()
        _memory_bars(memory, [run.label for run in known], weights, peaks)


def _memory_bars(axis: Any, names: list[str], weights: list[int], peaks: list[int]) -> None:
    mebi = 2**20
    left = [w / mebi for w in weights]
    axis.barh(names, left, label="weights")
    axis.barh(names, [p / mebi - w for w, p in zip(left, peaks, strict=True)], left=left, label="beyond")
    axis.set(xlabel="peak memory, MiB")
    axis.legend(fontsize=8)
    axis.invert_yaxis()
