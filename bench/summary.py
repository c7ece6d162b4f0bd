"""The summary of a run of the stages: the goals that were met, those that were not measured, and a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.goals import RATIOS, SPEED, STEP, describe, judge_peak_memory, judge_ratios, judge_speed, judge_step
from lozo_kernels.bench.memory import PUBLISHED_GB
from lozo_kernels.model.text_table import text_table

Row = dict[str, Any]


def load_documents(records: Sequence[Row], output: Path) -> dict[str, Row]:
    """Loads the documents that the stages of a run wrote, by stage."""
    documents = {}
    for record in records:
        for name in record["files"]:
            if name.endswith(".json"):
                documents[record["stage"]] = json.loads((output / name).read_text())
    return documents


def judge(documents: Mapping[str, Row]) -> list[Row]:
    """Judges every goal for a GPU over all documents; ``met`` is None where nothing was measured."""
    details: list[Row] = []
    steps: list[Row] = []
    ratios: list[Row] = []
    memory: list[Row] = []
    for document in documents.values():
        own = document.get("details", [])
        if own and "op" in own[0]:
            details += own
        elif own:
            steps += judge_step(own, "cuda", document["model"])
            ratios += judge_ratios(own, "cuda", document["model"])
        memory += judge_peak_memory([r for r in document.get("rows", []) if "peak_bytes" in r], document.get("model", ""))
    judged = judge_speed(details, "cuda")
    measured = {(t["op"], t["ratio_to"]) for t in judged}
    judged += [
        {"op": t.op, "dtype": t.dtype, "ranks": list(t.ranks), "ratio_to": t.peer, "shape": t.shape, "target": t.least, "met": None}
        for t in SPEED["cuda"]
        if (t.op, t.peer) not in measured
    ]
    judged += steps or [STEP["cuda"] | {"met": None}]
    probed = {(t["model"], t["placement"], t["tokens"]) for t in ratios}
    judged += ratios
    judged += [
        {"method": t.method, "placement": t.placement, "model": t.model, "tokens": t.tokens, "target_ratio": t.most, "met": None}
        for t in RATIOS["cuda"]
        if (t.model, t.placement, t.tokens) not in probed
    ]
    methods = {t["method"] for t in memory}
    judged += memory
    judged += [{"method": m, "target_gb": gb, "met": None} for m, gb in PUBLISHED_GB.items() if m not in methods]
    return judged


def goal(target: Row) -> str:
    """Describes a judged goal in one line."""
    if target["met"] is not None:
        return describe(target)
    words = [str(target[key]) for key in ("op", "method", "placement", "shape", "model") if target.get(key)]
    bound = next((f"{key} {target[key]}" for key in ("target", "overhead", "target_ratio", "target_gb") if key in target), "")
    to = f" of {target['ratio_to']}" if "ratio_to" in target else ""
    return f"not measured  {' '.join(words)}: {bound}{to}"


def table(summary: Row) -> str:
    """Formats the stages and the goals as text."""
    lines = [
        (
            r["stage"],
            r["status"],
            f"{r['seconds']:.1f}",
            "" if r["return_code"] is None else str(r["return_code"]),
            r["reason"] or "",
        )
        for r in summary["stages"]
    ]
    widths = text_table([("stage", "status", "seconds", "exit", ""), *((*line[:4], "") for line in lines)], left=2).splitlines()
    text = [widths[0], *(f"{row.ljust(len(widths[0]))}  {line[4]}".rstrip() for row, line in zip(widths[1:], lines, strict=True))]
    text += ["", *(goal(t) for t in summary["targets"])] if summary["targets"] else []
    text += ["", summary["note"]] if summary.get("note") else []
    return "\n".join(text)
