"""Several runs side by side: curves against steps and against time, memory, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError, require
from .summary import smoothed

Row = dict[str, Any]

FILES = ("metrics.jsonl", "summary.json")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """A finished run, read back from its folder.

    Attributes:
        label: how it is called in a legend.
        summary: of :func:`lozo_kernels.hf.reports.summary.summarize`.
        steps, evaluations: the lines of metrics.jsonl.
    """

    label: str
    summary: Row
    steps: list[Row]
    evaluations: list[Row]

    @property
    def seconds(self) -> list[float]:
        """Time in steps, without evaluations, at the end of each step."""
        total, out = 0.0, []
        for row in self.steps:
            total += row["step_ms"] / 1e3
            out.append(total)
        return out


def read_run(folder: Path) -> RunRecord:
    """What ``finetune`` left in a folder.

    Raises:
        InputError: there is no whole run.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no finished run: there is no {name}")
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        of_kind = {kind: [row for row in lines if row["kind"] == kind] for kind in ("step", "eval")}
        label = f"{summary['method']} ({folder.name})"
    except (ValueError, KeyError, TypeError) as e:
        raise InputError(f"{folder}: not the files of a run: {e}") from None
    return RunRecord(label, summary, of_kind["step"], of_kind["eval"])


def compare_runs(folders: Sequence[Path], output: Path) -> tuple[str, list[Path]]:
    """Writes curves.png and costs.png of runs into a folder.

    Returns:
        A table of the runs, and the files.

    Raises:
        InputError: a folder holds no run, or matplotlib is missing.
    """
    runs = [read_run(folder) for folder in folders]
    pyplot = _pyplot()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    files = [output / "curves.png", output / "costs.png"]
    for path, draw in zip(files, (_curves, _costs), strict=True):
        figure = draw(pyplot, runs)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
    return runs_table(runs), files


def runs_table(runs: Sequence[RunRecord]) -> str:
    """One line a run: where it began and ended, and what it cost."""
    header = ("run", "steps", "loss before", "after", "score before", "after", "ms/step", "peak MiB", "in times of inference")
    rows: list[tuple[str, ...]] = [header]
    for run in runs:
        s = run.summary
        mebibytes = None if s["training_peak_bytes"] is None else s["training_peak_bytes"] / 2**20
        numbers = (
            (s["loss_before"], ".4f"),
            (s["loss_after"], ".4f"),
            (s["accuracy_before"], ".1%"),
            (s["accuracy_after"], ".1%"),
            (s["step_ms"], ".2f"),
            (mebibytes, ".1f"),
            (s["training_peak_over_inference"], ".3f"),
        )
        rows.append((run.label, str(s["steps_done"]), *("-" if v is None else format(v, spec) for v, spec in numbers)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    cells = ([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))] for row in rows)
    return "\n".join("  ".join(line) for line in cells)


def plot_memory(rows: Sequence[Row], title: str, path: Path) -> None:
    """Bars of the peak memory of methods (rows of :mod:`~lozo_kernels.hf.papers.memory`), with the weights in each, as a PNG."""
    pyplot = _pyplot()
    rows = [row for row in rows if row["peak_bytes"] is not None]
    figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    names = [row["method"] for row in rows]
    _memory_bars(axis, names, [row["weights_bytes"] for row in rows], [row["peak_bytes"] for row in rows])
    axis.set(title=title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _curves(pyplot: Any, runs: Sequence[RunRecord]) -> Any:
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for run in runs:
        steps, seconds = [row["step"] + 1 for row in run.steps], run.seconds
        losses = smoothed([float("nan") if row["loss"] is None else row["loss"] for row in run.steps])
        at = [0.0, *seconds]
        scored = [row for row in run.evaluations if row["accuracy"] is not None]
        color = axes[0, 0].plot(steps, losses, label=run.label, linewidth=1)[0].get_color()
        axes[0, 1].plot(seconds, losses, color=color, linewidth=1)
        scores = [row["accuracy"] for row in scored]
        axes[1, 0].plot([row["step"] for row in scored], scores, "o-", color=color, markersize=3)
        axes[1, 1].plot([at[min(row["step"], len(seconds))] for row in scored], scores, "o-", color=color, markersize=3)
    for column, x in enumerate(("step", "seconds in steps")):
        axes[0, column].set(xlabel=x, ylabel="train loss (smoothed)")
        axes[1, column].set(xlabel=x, ylabel="dev accuracy")
    axes[0, 0].legend(fontsize=8)
    return figure


def _costs(pyplot: Any, runs: Sequence[RunRecord]) -> Any:
    figure, (time, memory) = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    labels = [run.label for run in runs]
    forwards = [run.summary["forwards_ms"] or 0.0 for run in runs]
    beyond = [max(0.0, (run.summary["step_ms"] or 0.0) - f) for run, f in zip(runs, forwards, strict=True)]
    time.barh(labels, forwards, label="forward passes")
    time.barh(labels, beyond, left=forwards, label="the rest: backward, passes over the weights")
    time.set(xlabel="ms per step", title="where the time of a step goes")
    time.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    time.invert_yaxis()
    known = [run for run in runs if run.summary["training_peak_bytes"] is not None]
    weights, peaks = ([run.summary[key] for run in known] for key in ("weight_bytes", "training_peak_bytes"))
    _memory_bars(memory, [run.label for run in known], weights, peaks)
    return figure


def _memory_bars(axis: Any, names: list[str], weights: list[int], peaks: list[int]) -> None:
    mebi = 2**20
    left = [w / mebi for w in weights]
    axis.barh(names, left, label="weights")
    axis.barh(names, [p / mebi - w for w, p in zip(left, peaks, strict=True)], left=left, label="beyond")
    axis.set(xlabel="peak memory, MiB")
    axis.legend(fontsize=8)
    axis.invert_yaxis()


def _pyplot() -> Any:
    require("matplotlib").use("Agg")
    from matplotlib import pyplot

    return pyplot
