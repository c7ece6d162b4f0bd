"""``lozo-kernels reproduce``: a table of a paper, measured here at a named scale beside the published numbers."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import torch

from ...bench.document import dumps
from ...bench.environment import OtherLoad, environment
from ...errors import InputError
from ..loop.records import finite
from ..methods import METHODS
from ..models.checkpoint import pick_device
from .memory import INFERENCE, measure_memory
from .results import TABLES
from .scales import Request
from .scores import measure_scores

Row = dict[str, Any]


def reproduce(request: Request, command: str = "") -> tuple[Row, str]:
    """Measures a table and leaves results.json, table.md and plots in the output folder.

    Args:
        request: checked here.
        command: how it was asked for, for the document.

    Returns:
        The document, and its table as Markdown.

    Raises:
        InputError: something that the user can put right.
    """
    request.check()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = pick_device(request.device)
    table, scale = request.paper, request.size
    output = Path(request.output or f"runs/reproduce-{table.name}")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    others = OtherLoad()
    document = environment(device, ()) | {"command": command, "table": table.name, "title": table.title, "source": table.source}
    document |= {"unit": table.unit, "scale": scale.name, "scale_means": scale.meaning, "request": dataclasses.asdict(request)}
    measure = measure_memory if table.name == "memory" else measure_scores
    found = measure(request, device, output, command)
    document |= {"date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    document |= {"cpus_used_by_others": others.mean(), "published": table.published, **found}
    (output / "results.json").write_text(dumps(finite(document)) + "\n", encoding="utf-8")
    text = render(document)
    (output / "table.md").write_text(text + "\n", encoding="utf-8")
    return document, text


def render(document: Row) -> str:
    """The document as Markdown: every row says whether it is published or measured here, and on which model."""
    table = TABLES[document["table"]]
    measured = _memory_cells(document) if table.name == "memory" else _score_cells(document)
    columns = list(dict.fromkeys([*(table.columns if table.published else ()), *(c for _, cells in measured for c in cells)]))
    lines = [
        f"# {table.title} ({table.unit})",
        "",
        f"- published: {table.source}" + ("" if table.published else "; there are no numbers of it here"),
        f"- measured here: {document['model_label']}; scale {document['scale']}: {document['scale_means']}",
        f"- on {document['device']}, {document['cpu']}, {document['threads']} threads, torch {document['versions']['torch']}, "
        f"commit {document['commit']}, {document['date']}",
        *(f"- {note}" for note in document["notes"]),
        *(f"- not measured: {row['method']} on {row['task']}: {row['error']}" for row in document["rows"] if "error" in row),
        "",
        _line(["source", "model", "method"], {c: c for c in columns}, columns),
        "|" + "|".join(["---"] * 3 + ["---:"] * len(columns)) + "|",
    ]
    for model, methods in table.published.items():
        lines += [_line(["published", model, METHODS[m].label], cells, columns) for m, cells in methods.items()]
    for name, cells in measured:
        label = METHODS[name].label if name in METHODS else name
        lines.append(_line(["measured here", document["model"], label], cells, columns))
    targets = [_target(t) for t in document.get("targets", ())]
    return "\n".join([*lines, *([""] if targets else []), *targets])


def _line(names: list[str], cells: dict[str, Any], columns: list[str]) -> str:
    def text(value: Any) -> str:
        return "-" if value is None else value if isinstance(value, str) else f"{value:.1f}"

    return "| " + " | ".join([*names, *(text(cells.get(c)) for c in columns)]) + " |"


def _score_cells(document: Row) -> list[tuple[str, dict[str, Any]]]:
    found: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        found.setdefault(row["method"], {})[row["task"]] = row["score"]
    return list(found.items())


def _memory_cells(document: Row) -> list[tuple[str, dict[str, Any]]]:
    column = f"{document['tokens']} tokens"
    found = []
    for row in document["rows"]:
        peak = row["peak_bytes"]
        size = "out of memory" if row.get("out_of_memory") else None if peak is None else f"{peak / 1e9:.4g}"
        ratio = row["over_inference"]
        name = f"{INFERENCE} ({row['dtype']})" if row["method"] == INFERENCE else row["method"]
        found.append((name, {column: size, "times inference": None if ratio is None else f"{ratio:.3f}"}))
    return found


def _target(target: Row) -> str:
    bounds = [f"{word} {target[key]:g}" for word, key in (("at least", "least"), ("at most", "most")) if target[key]]
    return f"- {target['name']}: {target['value']:.4g}, {' and '.join(bounds)}: {'yes' if target['met'] else 'no'}"
