"""Figures as PNG files, and that of the demo."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import require
from ...model.files import replacing


def draw_demo(path: Path, evaluations: Sequence[dict[str, Any]], costs: dict[str, Any]) -> Path:
    """Draws what the demo showed: right answers and loss over the steps, and the time of a step as bars.

    Args:
        evaluations: of a run, as in its summary.
        costs: what :func:`lozo_kernels.hf.demonstrate.measure_costs` returned.

    Returns:
        The path.
    """
    with figure(path, 1, 2, figsize=(12, 4.5)) as (learning, steps):
        at = [e["step"] for e in evaluations]
        learning.plot(at, [e["accuracy"] for e in evaluations], "o-", color="tab:blue", markersize=3, label="right answers")
        learning.plot(at, [e["loss"] for e in evaluations], "o-", color="tab:orange", markersize=3, label="loss")
        learning.set(
            xlabel="step of two forward passes", title="the small model, on examples that were not trained on", ylim=(0, None)
        )
        learning.legend(loc="lower left", fontsize=9)
        names, times = ([row[key] for row in costs["rows"]] for key in ("name", "ms"))
        colors = ["tab:gray", *["tab:blue"] * (len(names) - 2), "tab:red"]
        bars = steps.barh(names, times, color=colors)
        steps.bar_label(bars, [f" {row['ms']:.0f} ms, {row['ratio']:.2f}x" for row in costs["rows"]], fontsize=9)
        steps.set(xlabel="ms", title=f"a step of {costs['architecture']}, {costs['tokens']} tokens")
        steps.set_xlim(0, 1.35 * max(times))
        steps.invert_yaxis()
    return path


@contextlib.contextmanager
def figure(path: Path, *grid: int, figsize: tuple[float, float], **more: Any) -> Iterator[Any]:
    """The axes of a figure, which is saved as a PNG at the end of the block."""
    require("matplotlib").use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(*grid, figsize=figsize, layout="constrained", **more)
    try:
        yield axes
        with replacing(path) as part:
            drawn.savefig(part, dpi=120, format="png")
    finally:
        pyplot.close(drawn)
