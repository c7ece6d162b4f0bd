"""Plots of the results of a folder: ``python -m bench.plots bench/results/NAME`` writes PNG files beside its documents."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the documents are and the plots go")
    folder = parser.parse_args(argv).folder
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if "rows" not in document or not document["rows"]:
            continue
        for name, figure in figures(document).items():
            target = path.with_name(f"{path.stem}{name}.png")
            save(figure, document, target)
            print(target.name)
    return 0


def save(figure: Any, document: Row, target: Path) -> None:
    """Writes a plot, with its origin below."""
    figure.text(0.01, 0.01, origin(document), fontsize=6)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def origin(document: Row) -> str:
    """Which machine and code a figure is of."""
    where = f"{document['device']}, backend {document['backend']}, torch {document['versions']['torch']}"
    command = textwrap.shorten(document["command"], 150, placeholder=" ...")
    return f"{where}, commit {document['commit']}, {document['date']}\n{command}"


def figures(document: Row) -> dict[str, Any]:
    """The plots that a document is good for, by what is added to its name."""
    first = document["rows"][0]
    if "gbps" in first:
        cases = dict.fromkeys((r["shape"], r["dtype"]) for r in document["rows"])
        several = len(cases) > 1
        return {f"-{s}-{d}" if several else "": throughput(document, s, d) for s, d in cases}
    if "step_ms" in first:
        return {f"-{d}": overhead(document, d) for d in dict.fromkeys(r["dtype"] for r in document["rows"])}
    if "extra_bytes" in first:
        return {"": memory(document)}
    return {}


def throughput(document: Row, shape: str, dtype: str) -> Any:
    """GB/s of every op by rank, beside the floor and the peers of the plain perturbation."""
    rows = [r for r in document["rows"] if (r["shape"], r["dtype"]) == (shape, dtype)]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for op in dict.fromkeys(r["op"] for r in rows if r["rank"]):
        _line(axes, [(r["rank"], r["gbps"]) for r in rows if r["op"] == op], op, marker="o")
    plain = [r for r in rows if r["op"] == "lowrank_update"]
    for column, label in (("addmm", "addmm_"), ("reference", "published LOZO"), ("compiled", "published LOZO, compiled")):
        points = [(r["rank"], r[f"{column}_gbps"]) for r in plain if r[f"{column}_gbps"]]
        if points:
            _line(axes, points, label, marker="x", linestyle=":")
    for r in rows:
        if r["op"] == "dense_update":
            axes.axhline(r["gbps"], color="tab:brown", linestyle="--", label="dense_update (MeZO)")
    axes.axhline(max(r["floor_gbps"] for r in rows), color="black", label=f"floor: {document.get('floor', 'mul_')}")
    axes.set_xscale("log", base=2)
    ranks = sorted({r["rank"] for r in rows if r["rank"]})
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set(xlabel="rank", ylabel="GB/s, read and write", title=f"One pass over {shape}, {dtype}", ylim=(0, None))
    return _finished(figure, axes)


def overhead(document: Row, dtype: str) -> Any:
    """A step's share on top of its own two forward passes, by tokens; of a probe, which works within them, on top of plain ones."""
    details = [d for d in document["details"] if d["dtype"] == dtype]
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for method, placement in dict.fromkeys((d["method"], _placement(d)) for d in details):
        own = [d for d in details if (d["method"], _placement(d)) == (method, placement)]
        if placement != "inplace":
            points = [(d["tokens"], 100 * d["overhead_to_pure_forwards"]) for d in own]
            _line(axes, points, f"{method} {placement}", marker="s", linestyle="--")
            continue
        _line(axes, [(d["tokens"], 100 * d["overhead"]) for d in own], method, marker="o")
        if method in ("lozo", "mezo"):
            _line(
                axes, [(d["tokens"], 100 * d["reference_overhead"]) for d in own], f"published {method}", marker="x", linestyle=":"
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog", linthresh=1)
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    # Evaluations that share a forward pass can be faster than two.
    axes.set_ylim(None if any(_placement(d) == "batched" for d in details) else 0, None)
    tokens = sorted({d["tokens"] for d in details})
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set(xlabel="tokens of a batch", ylabel="% of the two forward passes", title=f"A step of {document['model']}, {dtype}")
    return _finished(figure, axes)


def memory(document: Row) -> Any:
    """Peak of a step by method where a GPU tells it, beside the published table; elsewhere what comes on top of the weights."""
    rows = [r for r in document["rows"] if "out_of_memory" not in r]
    peaks = all(r.get("peak_bytes") for r in rows)
    figure, axes = plt.subplots(figsize=(7, 4.5))
    names = [r["method"] if _placement(r) == "inplace" else f"{r['method']} {_placement(r)}" for r in rows]
    labels = names if len({r["dtype"] for r in rows}) == 1 else [f"{n}\n{r['dtype']}" for n, r in zip(names, rows, strict=True)]
    values = [r["peak_bytes"] / 1e9 if peaks else r["extra_percent"] for r in rows]
    axes.bar(range(len(rows)), values, label="measured")
    published = [(i, r["published_gb"]) for i, r in enumerate(rows) if r.get("published_gb")]
    if peaks and published:
        places, sizes = zip(*published, strict=True)
        axes.scatter(places, sizes, color="black", marker="_", s=400, label="published (batch not stated)")
    axes.set_xticks(range(len(rows)), labels, rotation=30, ha="right")
    axes.set(title=f"Memory of a step of {document['model']}", ylabel="peak, GB" if peaks else "beyond the weights and forward, %")
    if not peaks:
        axes.set_yscale("symlog", linthresh=1)
    return _finished(figure, axes)


def learning(document: Row) -> Any:
    """Two plots side by side: the score of each method at its best learning rate over steps, and over the time that steps took."""
    figure, both = plt.subplots(1, 2, figsize=(13, 5), sharey=True)
    key = "accuracy" if "accuracy" in document["runs"][0]["points"][0] else "loss"
    for method in dict.fromkeys(r["method"] for r in document["runs"]):
        runs = [r for r in document["runs"] if r["method"] == method and r["best"]]
        points = list(zip(*(r["points"] for r in runs), strict=False))
        middle = [statistics.median(p[key] for p in seeds) for seeds in points]
        for axes, x in zip(both, ("step", "seconds"), strict=True):
            along = [statistics.median(p[x] for p in seeds) for seeds in points]
            (line,) = axes.plot(along, middle, label=f"{method}, lr {runs[0]['lr']:g}, {len(runs)} seeds")
            axes.fill_between(
                along, [min(p[key] for p in s) for s in points], [max(p[key] for p in s) for s in points],
                color=line.get_color(), alpha=0.15,
            )  # fmt: skip
    both[0].set(xlabel="steps", ylabel=document["unit"], title=document["task"])
    both[1].set(xlabel="seconds in steps", title="median and range of the seeds")
    _finished(figure, both[0])
    return _finished(figure, both[1])


def _placement(row: Row) -> str:
    return row.get("placement", "inplace")  # older documents know no other


def probe_drift(document: Row) -> Any:
    """Three plots side by side: weights moved by probing alone, the dev loss of a run, and how far that is from fp32."""
    figure, (moved, losses, off) = plt.subplots(1, 3, figsize=(16, 5))
    for d in document["drift"]:
        points = [(p["probes"], p["relative_distance"]) for p in d["points"]]
        _line(moved, points, _way(d), **_style(d), marker=".")
    moved.set_xscale("log")
    moved.set_yscale("symlog", linthresh=1e-4)
    moved.set(xlabel="probes, learning rate 0", ylabel="distance from the start / norm", title="Weights", ylim=(-1e-5, None))
    for c in document["curves"]:
        _line(losses, list(zip(c["steps"], c["dev_loss"], strict=True)), _way(c), **_style(c))
        if any(c.get("off", [])):
            _line(off, [(s, 100 * x) for s, x in zip(c["steps"], c["off"], strict=True)], _way(c), **_style(c))
    losses.set(xlabel="steps", ylabel="dev loss, per token", title="260K-parameter Llama on SST-2 sentences")
    off.axhspan(-1, 1, color="black", alpha=0.1, label="1%")
    off.set_yscale("symlog", linthresh=1)
    off.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    off.set(xlabel="steps", ylabel="% of the decrease in float32", title="Decrease beside that in float32 with the same noise")
    for axes in (moved, losses):
        _finished(figure, axes)
    return _finished(figure, off)


_COLOURS = {
    "probe": "tab:green",
    "probe, activation": "tab:olive",
    "probe, scratch": "tab:cyan",
    "in place": "tab:blue",
    "in place, fused": "tab:purple",
    "published": "tab:red",
}
_LINES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def _way(row: Row) -> str:
    return f"{row['dtype']} {row['placement']}"


def _style(row: Row) -> Row:
    return {"color": _COLOURS[row["placement"]], "linestyle": _LINES[row["dtype"]]}


def _line(axes: Any, points: list[tuple[float, float]], label: str, **style: Any) -> None:
    axes.plot(*zip(*sorted(points), strict=True), label=label, **style)


def _finished(figure: Any, axes: Any) -> Any:
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


if __name__ == "__main__":
    sys.exit(main())
