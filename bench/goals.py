"""The project's goals, and which of them a measurement met: ``python -m bench.goals FILE ...``.

The files are documents of ``lozo-kernels bench perturb``, ``step`` or ``memory``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lozo_kernels.bench.document import gb
from lozo_kernels.bench.memory import PUBLISHED_GB, PUBLISHED_MODEL

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SpeedTarget:
    """The least ratio of two speeds of a pass over the weights.

    Attributes:
        op, dtype, ranks: the rows that it is about; the dense op has the rank None.
        peer: what it is compared with, a column of ``bench perturb``.
        least: the ratio that is to be reached.
        shape: the weights that it is about; None for any.
    """

    op: str
    dtype: str
    ranks: tuple[int | None, ...]
    peer: str
    least: float
    shape: str | None = None


_CPU = (
    SpeedTarget("lowrank_update", "float32", (1, 2, 4), "floor", 0.85),
    SpeedTarget("lowrank_update", "float32", (8,), "floor", 0.70),
    SpeedTarget("lowrank_update", "bfloat16", (1, 2, 4), "floor", 0.60),
    SpeedTarget("lowrank_update", "bfloat16", (8,), "floor", 0.45),
    SpeedTarget("lowrank_momentum", "float32", (4,), "floor", 0.80),
    SpeedTarget("lowrank_momentum", "bfloat16", (4,), "floor", 0.50),
    SpeedTarget("dense_update", "float32", (None,), "floor", 0.25),
    SpeedTarget("dense_update", "bfloat16", (None,), "floor", 0.13),
    SpeedTarget("dense_update_signs", "float32", (None,), "floor", 0.85),
    SpeedTarget("lowrank_update", "float32", (4,), "addmm", 1.7),
    SpeedTarget("lowrank_update", "bfloat16", (4,), "addmm", 1.7),
    SpeedTarget("lowrank_update", "float32", (1, 2, 4, 8), "reference", 20.0),
    SpeedTarget("lowrank_update", "bfloat16", (1, 2, 4, 8), "reference", 20.0),
    SpeedTarget("dense_update", "float32", (None,), "reference", 12.0),
    SpeedTarget("dense_update", "bfloat16", (None,), "reference", 12.0),
)
_GPU_RANKS = (1, 2, 4, 8, 16)
_GPU = (
    SpeedTarget("lowrank_update", "bfloat16", _GPU_RANKS, "floor", 0.93, "opt-13b"),
    SpeedTarget("dense_update", "bfloat16", (None,), "floor", 0.85, "opt-13b"),
    SpeedTarget("lowrank_update", "bfloat16", _GPU_RANKS, "reference", 6.0, "opt-13b"),
    SpeedTarget("lowrank_update", "bfloat16", _GPU_RANKS, "addmm", 1.5, "opt-13b"),
)
SPEED = {"cpu": _CPU, "cuda": _GPU}
"""One pass over the weights, by device type: two threads of an AVX-512 CPU; an H200."""

STEP = {
    "cpu": {"model": "opt-125m", "method": "lozo", "dtype": "bfloat16", "tokens": 512, "overhead": 0.06},
    "cuda": {"model": "opt-13b", "method": "lozo", "dtype": "bfloat16", "tokens": 4096, "overhead": 0.10},
}
"""The most that a step may take on top of its own two forward passes, by device type."""


@dataclasses.dataclass(frozen=True)
class RatioTarget:
    """The most that a step may take, as a multiple of two plain forward passes."""

    placement: str
    tokens: int
    most: float
    method: str = "lozo"
    model: str = "opt-125m"
    dtypes: tuple[str, ...] = ("bfloat16", "float32")


RATIOS = {
    "cpu": (
        RatioTarget("probe", 512, 1.08),
        RatioTarget("probe", 128, 1.12),
        RatioTarget("batched", 16, 0.85),
        RatioTarget("batched", 32, 0.85),
        RatioTarget("batched", 64, 0.85),
    ),
    "cuda": tuple(
        target
        for model in ("opt-1.3b", "opt-13b")
        for target in (
            RatioTarget("probe", 2048, 1.05, model=model, dtypes=("bfloat16",)),
            RatioTarget("batched", 64, 0.7, model=model, dtypes=("bfloat16",)),
        )
    ),
}
"""Steps that only read the weights, by device type."""

EXTRA_MEMORY = 0.01
"""On the CPU: extra bytes of every method of this library but MeZO-M at rank 4 that moves weights, as a share of the weights."""
PROBE_SLACK = 0.01
"""What a probe's step may take beyond its factors and its scratch memory, as a share of the weights."""


def judge_speed(details: Sequence[Row], device_type: str) -> list[Row]:
    """Judges every speed target that was measured by the worst ratio."""
    judged = []
    for target in SPEED.get(device_type, ()):
        found = [
            d
            for d in details
            if d["op"] == target.op
            and d["dtype"] == target.dtype
            and d["rank"] in target.ranks
            and target.shape in (None, d.get("shape"))
            and target.peer in d["ratios"]
        ]
        ratios = [d["ratios"][target.peer] for d in found]
        if ratios:
            row = {"op": target.op, "dtype": target.dtype, "ranks": list(target.ranks), "ratio_to": target.peer}
            row |= {"shape": target.shape} if target.shape else {}
            row["measured_ranks"] = [rank for rank in target.ranks if rank in {d["rank"] for d in found}]
            judged.append(row | {"target": target.least, "worst": min(ratios), "met": min(ratios) >= target.least})
    return judged


def judge_step(details: Sequence[Row], device_type: str, model: str) -> list[Row]:
    """Judges the target of a step, if its case was measured."""
    target = STEP.get(device_type)
    if target is None or target["model"] != model:
        return []
    return [
        target | {"measured": d["overhead"], "met": d["overhead"] <= target["overhead"]}
        for d in details
        if _in_place(d) and all(d[key] == target[key] for key in ("method", "dtype", "tokens"))
    ]


def judge_ratios(details: Sequence[Row], device_type: str, model: str) -> list[Row]:
    """Judges the targets of steps that only read the weights, where their case was measured."""
    return [
        {"method": target.method, "placement": target.placement, "dtype": d["dtype"], "tokens": target.tokens, "model": model}
        | {"target_ratio": target.most, "measured": d["times_two_forwards"], "met": d["times_two_forwards"] <= target.most}
        for target in RATIOS.get(device_type, ())
        if target.model == model
        for d in details
        if (target.method, target.placement, target.tokens) == (d["method"], d.get("placement"), d["tokens"])
        and d["dtype"] in target.dtypes
    ]


def _in_place(row: Row) -> bool:
    return row.get("placement", "inplace") == "inplace"  # older documents know no other


def judge_extra_memory(rows: Sequence[Row]) -> list[Row]:
    """Judges the memory target of the CPU for every row of this library at rank 4 that moves weights."""
    return [
        {"method": row["method"], "dtype": row["dtype"], "rank": 4, "target_percent": 100 * EXTRA_MEMORY}
        | {"measured_percent": row["extra_percent"], "met": row["extra_percent"] < 100 * EXTRA_MEMORY}
        for row in rows
        if row["rank"] == 4 and _in_place(row) and not row["method"].startswith("published") and row["method"] != "mezo-m"
    ]


def judge_probe_memory(rows: Sequence[Row]) -> list[Row]:
    """Judges the memory target of every probe that evaluates one point at a time: factors, scratch, and a little."""
    judged = []
    for row in rows:
        if not _in_place(row) and row["placement"] != "batched":
            most = row["factor_bytes"] + row["scratch_bytes"] + int(PROBE_SLACK * row["weights_bytes"])
            case = {key: row[key] for key in ("method", "placement", "dtype", "rank")}
            judged.append(case | {"target_bytes": most, "measured_bytes": row["extra_bytes"], "met": row["extra_bytes"] <= most})
    return judged


def judge_peak_memory(rows: Sequence[Row], model: str) -> list[Row]:
    """Compares the peak of every method that the published table has with that table."""
    if model != PUBLISHED_MODEL:
        return []
    return [
        {"method": row["method"], "dtype": row["dtype"], "rank": row["rank"], "tokens": row["tokens"]}
        | {"target_gb": PUBLISHED_GB[row["method"]], "measured_gb": gb(row["peak_bytes"])}
        | {"met": row["peak_bytes"] <= 1e9 * PUBLISHED_GB[row["method"]]}
        for row in rows
        if _in_place(row) and row["method"] in PUBLISHED_GB and row["dtype"] != "float32" and row.get("peak_bytes")
    ]


def describe(target: Row) -> str:
    """Describes a judged target of any kind in one line."""
    ranks = target.get("measured_ranks") or [None]
    rank = f" rank {', '.join(map(str, ranks))}" if ranks != [None] else ""
    if "ratio_to" in target:
        what = f"{target['op']} {target['dtype']}{rank}" + (f" on {target['shape']}" if "shape" in target else "")
        text = f"{what}: worst {target['worst']:g} of {target['ratio_to']}, target {target['target']:g}"
    elif "overhead" in target:
        what = f"{target['method']} {target['dtype']} {target['tokens']} tokens of {target['model']}"
        text = f"{what}: {target['measured']:.1%} on top of its two forward passes, target {target['overhead']:.0%}"
    elif "target_ratio" in target:
        what = f"{target['method']} {target['placement']} {target['dtype']} {target['tokens']} tokens of {target['model']}"
        text = f"{what}: {target['measured']:.3f} times two forward passes, target {target['target_ratio']:g}"
    elif "target_bytes" in target:
        what = f"{target['method']} {target['placement']} {target['dtype']} rank {target['rank']}"
        size, most = (f"{target[key] / 2**20:.2f}" for key in ("measured_bytes", "target_bytes"))
        text = f"{what}: {size} MiB, target {most} MiB: factors, scratch and {PROBE_SLACK:.0%} of the weights"
    elif "target_gb" in target:
        what = f"{target['method']} {target['dtype']} rank {target['rank']}"
        text = f"{what}: {target['measured_gb']:g} GB at its peak, published {target['target_gb']:g} GB"
    else:
        what = f"{target['method']} {target['dtype']} rank {target['rank']}"
        text = f"{what}: {target['measured_percent']:.2f}% of the weights, target under {target['target_percent']:g}%"
    return f"{'met   ' if target['met'] else 'missed'}  {text}"


def judge(document: Row) -> list[Row]:
    """Judges every goal that a document of the benchmark command has a measurement for."""
    details, rows = document.get("details") or [], document.get("rows") or []
    kind = "cuda" if "gpu" in document else "cpu"
    if details and "op" in details[0]:
        return judge_speed(details, kind)
    if details:
        return judge_step(details, kind, document["model"]) + judge_ratios(details, kind, document["model"])
    measured = [row for row in rows if "extra_bytes" in row]
    peaks = judge_peak_memory(measured, document.get("model", "")) if kind == "cuda" else judge_extra_memory(measured)
    return peaks + judge_probe_memory(measured)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the goals of each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args(argv).files:
        print(path, *map(describe, judge(json.loads(path.read_text(encoding="utf-8")))), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
