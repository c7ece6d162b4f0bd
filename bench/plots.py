"""Plots of results: ``python -m bench.plots FILE`` draws a document, or all of a folder, into PNG files beside them.

A page shows a picture about 900 pixels wide: every figure is 8.5 inches wide, with letters that can be read at that size.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.ticker

matplotlib.use("Agg")
import matplotlib.pyplot as plt

plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9})
WIDTH = 8.5
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a document, or a folder of documents; the plots go beside them")
    source = parser.parse_args(argv).source
    for path in sorted(source.glob("*.json")) if source.is_dir() else [source]:
        document = json.loads(path.read_text(encoding="utf-8"))
        for name, figure in figures(document).items():
            target = path.with_name(f"{path.stem}{name}.png")
            save(figure, document, target)
            print(target.name)
    return 0


def save(figure: Any, document: Row, target: Path) -> None:
    """Writes a plot, with its origin below."""
    figure.text(0.01, 0.005, origin(document), fontsize=7, linespacing=1.3)
    figure.savefig(target, dpi=150)
    plt.close(figure)


def origin(document: Row) -> str:
    """Which machine and code a figure is of."""
    versions = document["versions"]
    if "device" in document:
        where = f"{document.get('cpu', document['device'])}, threads: {document.get('threads')}, backend {document['backend']}"
        where += f", torch {versions['torch']}"
    else:
        where = f"compiled ahead of time, not run; triton {versions['triton']}"
    command = textwrap.shorten(document["command"], 130, placeholder=" ...")
    return f"{where}, commit {document['commit']}, {document['date'][:10]}\n{command}"


def figures(document: Row) -> dict[str, Any]:
    """The plots that a document is good for, by what is added to its name."""
    if "runs" in document and "unit" in document:
        return {"": learning(document)}
    if "drift" in document and "curves" in document:
        return {"": probe_drift(document)}
    first = next(iter(document.get("rows", [])), {})
    if "gbps" in first:
        cases = dict.fromkeys((r["shape"], r["dtype"]) for r in document["rows"])
        several = len(cases) > 1
        return {f"-{s}-{d}" if several else "": throughput(document, s, d) for s, d in cases}
    if "step_ms" in first:
        return {f"-{d}": step_times(document, d) for d in dict.fromkeys(r["dtype"] for r in document["rows"])}
    if "extra_bytes" in first:
        return {"": memory(document)}
    if "instr_per_element" in first:
        targets = [t["target"] for t in document["targets"]]
        return {"": instructions(document, "sm_90" if "sm_90" in targets else targets[0])}
    return {}


def throughput(document: Row, shape: str, dtype: str) -> Any:
    """GB/s of every op by rank, beside the floor and the peers of the plain perturbation."""
    rows = [r for r in document["rows"] if (r["shape"], r["dtype"]) == (shape, dtype)]
    figure, axes = plt.subplots(figsize=(WIDTH, 4.8))
    for op in dict.fromkeys(r["op"] for r in rows if r["rank"]):
        _line(axes, [(r["rank"], r["gbps"]) for r in rows if r["op"] == op], op, marker="o")
    plain = [r for r in rows if r["op"] == "lowrank_update"]
    for column, label in (("addmm", "addmm_"), ("reference", "published LOZO"), ("compiled", "published LOZO, compiled")):
        points = [(r["rank"], r[f"{column}_gbps"]) for r in plain if r.get(f"{column}_gbps")]
        if points:
            _line(axes, points, label, marker="x", linestyle=":")
    for r in rows:
        if r["op"] == "dense_update":
            axes.axhline(r["gbps"], color="tab:brown", linestyle="--", label="dense_update (MeZO)")
    _line(axes, [(r["rank"], r["floor_gbps"]) for r in plain], f"floor: {document.get('floor', 'mul_')}", color="black")
    axes.set_xscale("log", base=2)
    ranks = sorted({r["rank"] for r in rows if r["rank"]})
    axes.set_xticks(ranks, [str(r) for r in ranks])
    axes.set(xlabel="rank", ylabel="GB/s, read and write", title=f"One pass over {shape}, {dtype}", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def step_times(document: Row, dtype: str) -> Any:
    """The time of a step in multiples of two plain forward passes, by tokens, beside that of the published code."""
    details = [d for d in document["details"] if d["dtype"] == dtype]
    lines: dict[str, Row] = {}
    for method, placement in dict.fromkeys((d["method"], _placement(d)) for d in details):
        own = [d for d in details if (d["method"], _placement(d)) == (method, placement)]
        where = {"inplace": "in place", "batched": "probe, batched"}.get(placement, placement)
        points = {d["tokens"]: d.get("times_two_forwards", 1 + d["overhead_to_pure_forwards"]) for d in own}
        lines[f"{_name(method)} {where}"] = points
        if placement == "inplace" and method in ("lozo", "mezo"):
            lines[f"{_name(method)} published"] = {d["tokens"]: 1 + d["reference_overhead"] for d in own}
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2))
    axes.axhline(1, color="black", linewidth=1.2)
    fewest, most = min(d["tokens"] for d in details), max(d["tokens"] for d in details)
    for label, points in sorted(lines.items(), key=lambda line: -line[1].get(fewest, 0)):
        ends = " to ".join(f"{points[t]:.{1 if points[t] > 9.95 else 2}f}" for t in dict.fromkeys((fewest, most)) if t in points)
        colour = _METHOD_COLOURS.get(label.split(" ")[0])
        line, marker = _PLACEMENT_STYLES.get(label.split(" ", 1)[1], ("--", "s"))
        _line(axes, list(points.items()), f"{label}: {ends}", color=colour, linestyle=line, marker=marker, markersize=5)
    axes.text(most, 0.93, "two forward passes", ha="right", va="top", fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100) if t <= 2 * max(max(points.values()) for points in lines.values())]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    tokens = sorted({d["tokens"] for d in details})
    axes.set_xticks(tokens, [str(t) for t in tokens])
    axes.set(xlabel="tokens of a batch", ylabel="time of a step / two forward passes")
    axes.set_title(f"A step of {document['model']} in {dtype} beside two forward passes", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, handlelength=2.6,
        title=f"{fewest} to {most} tokens", alignment="left",
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def memory(document: Row) -> Any:
    """Peak of a step by method where a GPU tells it, beside the published table; elsewhere what comes on top of the weights."""
    rows = [r for r in document["rows"] if "out_of_memory" not in r]
    peaks = all(r.get("peak_bytes") for r in rows)
    figure, axes = plt.subplots(figsize=(WIDTH, 1.8 + 0.26 * len(rows)))
    one_dtype = len({r["dtype"] for r in rows}) == 1
    for i, r in enumerate(reversed(rows)):
        value = r["peak_bytes"] / 1e9 if peaks else r["extra_percent"]
        axes.barh(i, value, color="tab:red" if r["method"].startswith("published") else "tab:blue")
        axes.text(value, i, f" {value:.3g}", va="center", fontsize=9)
        if peaks and r.get("published_gb"):
            axes.scatter(r["published_gb"], i, color="black", marker="|", s=200, zorder=3)
    names = [f"{_name(r['method'])}{'' if _placement(r) == 'inplace' else ' ' + _placement(r)}" for r in reversed(rows)]
    if not one_dtype:
        names = [f"{name}, {r['dtype']}" for name, r in zip(names, reversed(rows), strict=True)]
    axes.set_yticks(range(len(rows)), names)
    unit = "peak, GB; black: published (batch not stated)" if peaks else "beyond the weights and a forward pass, % of the weights"
    axes.set(title=f"Memory of a step of {document['model']}", xlabel=unit)
    if not peaks:
        axes.set_xscale("symlog", linthresh=1)
        axes.set_xlim(0, 3 * max(r["extra_percent"] for r in rows))
    axes.grid(alpha=0.3, axis="x")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def learning(document: Row) -> Any:
    """Two plots: the score of each method at its best learning rate over steps, and over the time that steps took."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 4.6), sharey=True)
    key = "accuracy" if "accuracy" in document["runs"][0]["points"][0] else "loss"
    for method in dict.fromkeys(r["method"] for r in document["runs"]):
        runs = [r for r in document["runs"] if r["method"] == method and r["best"]]
        points = list(zip(*(r["points"] for r in runs), strict=False))
        middle = [statistics.median(p[key] for p in seeds) for seeds in points]
        for axes, x in zip(both, ("step", "seconds"), strict=True):
            along = [statistics.median(p[x] for p in seeds) for seeds in points]
            (line,) = axes.plot(along, middle, label=f"{_name(method)}, lr {runs[0]['lr']:g}")
            axes.fill_between(
                along, [min(p[key] for p in s) for s in points], [max(p[key] for p in s) for s in points],
                color=line.get_color(), alpha=0.15,
            )  # fmt: skip
    _say_what(figure, both, document, "steps", f"median and range of {len(runs)} seeds", columns=3, below=0.07)
    return figure


def _say_what(figure: Any, both: Any, document: Row, along: str, note: str, *, columns: int, below: float) -> None:
    """Titles, axes and legend of two plots of a task: over ``along`` and over seconds. ``below``: height under the legend."""
    both[0].set(xlabel=along, ylabel=document["unit"])
    both[1].set(xlabel="seconds in steps")
    both[0].set_title(document["task"], loc="left")
    both[1].set_title(note, loc="right", fontsize=9)
    for axes in both:
        axes.grid(alpha=0.3)
    handles, labels = both[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=columns, bbox_to_anchor=(0.5, below), frameon=False)
    figure.tight_layout(rect=(0, below + 0.02 + 0.2 * math.ceil(len(labels) / columns) / figure.get_figheight(), 1, 1))


def passes(document: Row) -> Any:
    """Dev loss of every rule at its best rate over forward passes, and over the seconds of steps: means over seeds."""
    figure, both = plt.subplots(1, 2, figsize=(WIDTH, 7), sharey=True)
    for i, rule in enumerate(document["rules"]):
        runs = [r for r in document["runs"] if r["rule"] == rule["rule"] and r["best"]]
        style = {"color": f"C{i % 10}", "linestyle": "-" if i < 10 else "--"}
        points = list(zip(*(r["points"] for r in runs), strict=False))
        losses = [statistics.mean(p["loss"] for p in at) for at in points]
        along = [statistics.mean(p["passes"] for p in at) for at in points]
        for axes, unit in zip(both, (1.0, rule["ms_per_pass"] / 1000), strict=True):
            rate = "" if rule["lr"] == "auto" else f", lr {rule['lr']:g}"
            axes.plot([x * unit for x in along], losses, marker=".", label=f"{rule['rule']}{rate}", **style)
    _say_what(figure, both, document, "forward passes", f"mean of {len(runs)} seeds", columns=2, below=0.05)
    return figure


def instructions(document: Row, target: str, dtype: str = "bfloat16") -> Any:
    """Instructions per element of every kernel that moves weights: a plot by rank for each, and bars of those without one."""
    chosen = next(t for t in document["targets"] if t["target"] == target)
    limit = chosen[f"memory_bound_instr_{32 if dtype == 'float32' else 16}_bit"]
    rows = [r for r in document["rows"] if (r["target"], r["dtype"]) == (target, dtype) and r["vector_bits"] is not None]
    rows.sort(key=lambda r: (r["naive"], r["kernel"].startswith("cuda"), r["kernel"], r["rank"] or 0))
    kernels = list(dict.fromkeys(r["kernel"] for r in rows if r["rank"]))
    plain = [r for r in rows if not r["rank"]][::-1]
    across, down = 4, math.ceil(len(kernels) / 4)
    heights = [1.3 * down + 0.5, 0.2 * len(plain) + 1]
    figure = plt.figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=heights)
    ranks = sorted({r["rank"] for r in rows if r["rank"]})
    for kernel, axes in zip(kernels, upper.subplots(down, across, sharex=True, sharey=True).flat, strict=False):
        own = [r for r in rows if r["kernel"] == kernel]
        axes.axhline(limit, color="tab:orange", linestyle="--", linewidth=1.2)
        axes.plot([r["rank"] for r in own], [r["instr_per_element"] for r in own], marker="o", markersize=4, color=_colour(own[0]))
        axes.scatter([r["rank"] for r in own], [r["budget"] or math.nan for r in own], marker="_", s=90, color="black")
        axes.set_title(kernel.replace("_stochastic", "_stoch."), fontsize=8, pad=3)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(ranks, [str(r) for r in ranks], fontsize=8)
        axes.set_yticks([4, 16, 64, 256], ["4", "16", "64", "256"], fontsize=8)
        axes.grid(alpha=0.3)
    upper.suptitle(f"Instructions per element by rank, {dtype}, compiled for {target} ({chosen['device']})", fontsize=11)
    bars = lower.subplots()
    bars.axvline(limit, color="tab:orange", linestyle="--", linewidth=1.2, label=f"bound by memory below {limit:.0f}")
    bars.barh(range(len(plain)), [r["instr_per_element"] for r in plain], color=[_colour(r) for r in plain], height=0.7)
    bars.scatter([r["budget"] or math.nan for r in plain], range(len(plain)), marker="|", s=90, color="black", label="budget")
    for i, r in enumerate(plain):
        bars.text(max(r["instr_per_element"], r["budget"] or 0) + 1, i, f"{r['instr_per_element']:.0f}", va="center", fontsize=8)
    for label, colour in (("used by default", "tab:blue"), ("other", "tab:cyan"), ("naive, for comparison", "tab:red")):
        bars.bar(0, 0, color=colour, label=label)
    bars.set_yticks(range(len(plain)), [r["kernel"] for r in plain], fontsize=8)
    bars.set_title("kernels without a rank", fontsize=9, pad=3)
    bars.set(xlabel="instructions per element", xlim=(0, 1.08 * max(r["instr_per_element"] for r in plain)))
    bars.legend(loc="upper right")
    bars.grid(alpha=0.3, axis="x")
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    return figure


def _colour(row: Row) -> str:
    return "tab:red" if row["naive"] else "tab:blue" if row["default"] else "tab:cyan"


def _name(method: str) -> str:
    """As the papers write it."""
    if method.startswith("published "):
        return f"{_name(method.removeprefix('published '))} published"
    written = {
        "lozo": "LOZO",
        "lozo-m": "LOZO-M",
        "lozo-fused": "LOZO fused",
        "mezo": "MeZO",
        "mezo-m": "MeZO-M",
        "subzero": "SubZero",
        "adamw": "AdamW",
    }
    return written.get(method, method)


def _placement(row: Row) -> str:
    return row.get("placement", "inplace")  # older documents know no other


def probe_drift(document: Row) -> Any:
    """Three plots: weights moved by evaluating alone, the dev loss of a run, and how far that is from fp32."""
    figure, ((moved, losses), (off, key)) = plt.subplots(2, 2, figsize=(WIDTH, 7))
    for d in document["drift"]:
        points = sorted((p["probes"], p["relative_distance"]) for p in d["points"])
        moved.plot(*zip(*points, strict=True), **_style(d), marker=".")
    moved.set_xscale("log")
    moved.set_yscale("symlog", linthresh=1e-4)
    moved.set(xlabel="evaluations at learning rate 0", ylabel="distance / norm of the weights", ylim=(-1e-5, None))
    moved.set_title("Weights that should not move", loc="left")
    if max(p["relative_distance"] for d in document["drift"] for p in d["points"]) == 0:
        moved.set(ylim=(-1e-5, 1e-4), yticks=[0])
        moved.text(0.5, 0.5, "no bit changed", transform=moved.transAxes, ha="center")
    for c in document["curves"]:
        losses.plot(c["steps"], c["dev_loss"], **_style(c))
        if any(c.get("off", [])):
            off.plot(c["steps"], [100 * x for x in c["off"]], **_style(c))
    losses.set(xlabel="steps", ylabel="dev loss, per token")
    losses.set_title("260K-parameter Llama on SST-2", loc="left")
    off.axhspan(-1, 1, color="black", alpha=0.1)
    off.text(0.98, 0.98, "grey: within 1%", transform=off.transAxes, ha="right", va="top", fontsize=9)
    off.set_yscale("symlog", linthresh=1)
    off.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    off.set(xlabel="steps", ylabel="% of the decrease in float32")
    off.set_title("Decrease of the loss beside float32", loc="left")
    for axes in (moved, losses, off):
        axes.grid(alpha=0.3)
    key.axis("off")
    shown = {f"{r['dtype']} {r['placement']}": _style(r) for r in (*document["curves"], *document["drift"])}
    key.legend([plt.Line2D([], [], **style) for style in shown.values()], shown, loc="center left", frameon=False, handlelength=3)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    return figure


_COLOURS = {
    "probe": "tab:green",
    "probe, activation": "tab:olive",
    "probe, scratch": "tab:cyan",
    "in place": "tab:blue",
    "in place, fused": "tab:purple",
    "published": "tab:red",
}
_METHOD_COLOURS = {"LOZO": "tab:blue", "LOZO-M": "tab:cyan", "MeZO": "tab:orange", "MeZO-M": "tab:red", "SubZero": "tab:green"}
_PLACEMENT_STYLES = {"published": (":", "x"), "in place": ("-", "o"), "probe, batched": ("-.", "^")}
_LINES = {"float32": "-", "bfloat16": "--", "float16": ":"}


def _style(row: Row) -> Row:
    wide = {"linewidth": 4, "alpha": 0.4} if row["placement"] == "published" else {}  # other lines lie on it
    return {"color": _COLOURS[row["placement"]], "linestyle": _LINES[row["dtype"]], **wide}


def _line(axes: Any, points: list[tuple[float, float]], label: str, **style: Any) -> None:
    axes.plot(*zip(*sorted(points), strict=True), label=label, **style)


if __name__ == "__main__":
    sys.exit(main())
