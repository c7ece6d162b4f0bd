"""``lozo-kernels reproduce``: a table of a paper, measured here at a named scale beside the published numbers."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from ...bench.document import dumps
from ...bench.environment import OtherLoad, environment
from ...model.files import write_whole
from ...model.text_table import markdown_table, number
from ..loop.folder import claimed, find_run
from ..methods import METHODS
from ..models.checkpoint import pick_device
from ..output import finite
from .memory import INFERENCE, measure_memory
from .results import TABLES
from .scales import Request, Row
from .scores import measure_scores


def reproduce(request: Request, command: str = "") -> tuple[Row, str]:
    """Measures a table and leaves results.json, table.md and plots in the output folder.

    Args:
        request: checked here.
        command: how it was asked for, for the document.

    Returns:
        The document, and its table as Markdown.

    Raises:
        InputError: something that the user can put right; the output folder is in use or has other results.
        KeyboardInterrupt: its message says what the folder holds.
    """
    request.check()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = pick_device(request.device)
    output, numbered = Path(request.output or f"runs/reproduce-{request.table}"), request.output is None
    with claimed(output, overwrite=request.overwrite, numbered=numbered, contents=_find_results) as folder:
        try:
            return _measure(request, device, folder, command)
        except KeyboardInterrupt:
            found = _find_results(folder)
            raise KeyboardInterrupt(f"{folder} {found}" if found else "") from None


def _measure(request: Request, device: torch.device, output: Path, command: str) -> tuple[Row, str]:
    table, scale = request.paper, request.size
    others = OtherLoad()
    measure = measure_memory if table.name == "memory" else functools.partial(measure_scores, command=command)
    found = measure(request, device, output)
    document = environment(device, ()) | {"command": command, "table": table.name, "title": table.title, "source": table.source}
    document |= {"unit": table.unit, "scale": scale.name, "scale_means": scale.meaning, "request": dataclasses.asdict(request)}
    document |= {"cpus_used_by_others": others.mean(), "published": table.published, **found}
    write_whole(output / "results.json", dumps(finite(document)) + "\n")
    text = render(document)
    write_whole(output / "table.md", text + "\n")
    return document, text


def _find_results(folder: Path) -> str | None:
    """What an earlier reproduction left in a folder, for a message; None if nothing would be lost."""
    if (folder / "results.json").is_file():
        return "holds the results of a reproduction"
    runs = [path.name for path in sorted(folder.iterdir()) if path.is_dir() and find_run(path) is not None]
    return f"holds {len(runs)} runs of a reproduction that was stopped" if runs else None


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
    ]
    rows = [("published", model, name, cells) for model, methods in table.published.items() for name, cells in methods.items()]
    rows += [("measured here", document["model"], name, cells) for name, cells in measured]
    labels = {name: method.label for name, method in METHODS.items()}
    lines.append(
        markdown_table(
            ["source", "model", "method", *columns],
            [
                [source, model, labels.get(name, name), *(_cell(cells.get(c)) for c in columns)]
                for source, model, name, cells in rows
            ],
            left=3,
        )
    )
    targets = [_target(t) for t in document.get("targets", ())]
    return "\n".join([*lines, *([""] if targets else []), *targets])


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else number(value, ".1f")


def _score_cells(document: Row) -> list[tuple[str, dict[str, Any]]]:
    found: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        found.setdefault(row["method"], {})[row["task"]] = row["score"]
    return list(found.items())


def _memory_cells(document: Row) -> list[tuple[str, dict[str, Any]]]:
    column = f"{document['tokens']} tokens"
    found = []
    for row in document["rows"]:
        size = "out of memory" if row.get("out_of_memory") else number(row["peak_bytes"] and row["peak_bytes"] / 1e9, ".4g")
        name = f"{INFERENCE} ({row['dtype']})" if row["method"] == INFERENCE else row["method"]
        found.append((name, {column: size, "times inference": number(row["over_inference"], ".3f")}))
    return found


def _target(target: Row) -> str:
    bounds = [f"{word} {target[key]:g}" for word, key in (("at least", "least"), ("at most", "most")) if target[key]]
    return f"- {target['name']}: {target['value']:.4g}, {' and '.join(bounds)}: {'yes' if target['met'] else 'no'}"
