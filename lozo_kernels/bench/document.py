"""Results as JSON documents and as plain tables."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..model.files import write_whole
from .environment import PROGRAM, environment

_QUIET = 0.1  # CPUs that others may use without a warning


def where(device: torch.device, argv: Sequence[str], program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """Describes where a measurement is made: :func:`~lozo_kernels.bench.environment.environment`, and the data of a GPU."""
    found = environment(device, argv, program=program)
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "l2_bytes": getattr(p, "L2_cache_size", None),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return found


def first_line(error: BaseException) -> str:
    """Returns what an error says, in one line of limited length."""
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:200]


def publish(document: dict[str, Any], render: Callable[[dict[str, Any]], str], *, as_json: bool, output: str | Path | None) -> None:
    """Prints the document, or the table that ``render`` makes of it, and writes the document to a file if one is named."""
    text = dumps(document)
    if output is not None:
        write_whole(Path(output), text + "\n")
    print(text if as_json else f"{heading(document)}\n\n{render(document)}", flush=True)


def save_partial(document: dict[str, Any], output: str | Path | None, **parts: Any) -> None:
    """Writes what was measured so far, marked as incomplete, because a measurement may be stopped."""
    if output is not None:
        write_whole(Path(output), dumps(document | {"complete": False} | parts) + "\n")


def dumps(document: dict[str, Any]) -> str:
    """Formats JSON with one line for each row, so that two results differ only in the lines of rows that differ."""
    lines = []
    for key, value in document.items():
        if isinstance(value, list) and value:
            items = ",\n".join("    " + json.dumps(item) for item in value)
            lines.append(f"  {json.dumps(key)}: [\n{items}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def heading(document: dict[str, Any]) -> str:
    """Says where the figures come from, and warns if the machine was busy with other things."""
    versions = document["versions"]
    isa = f", {document['isa']}" if document["isa"] else ""
    text = (
        f"{document['cpu']}, {document['device']}, {document['threads']} threads, backend {document['backend']}{isa}, "
        f"torch {versions['torch']}, commit {document['commit']}, {document['date']}"
    )
    others = document["cpus_used_by_others"]
    if others is not None and others > _QUIET:
        text += f"\nother processes used {others:g} CPUs meanwhile: measure again on a quiet machine"
    return text


def gb(size: int) -> float:
    """Converts bytes to units of 10^9 bytes."""
    return round(size / 1e9, 2)


def progress(text: str) -> None:
    """Prints a line for someone who waits, on stderr, because stdout is for results."""
    print(text, file=sys.stderr, flush=True)
