"""The table of tasks. A new task is a new row of ``tasks.json``; nothing else in the package knows a task by its name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..demo import language
from .own import CHAT, COMPLETION, COMPLETION_TEXT, OWN, SENTENCE, TEXT
from .task import KINDS, Hub, Row, Task
from .unpack import UNPACK


def _go_again(seed: int) -> tuple[list[Row], list[Row]]:
    train, dev = language.reviews(seed, train=1000, dev=500)
    return [{"text": t, "label": y} for t, y in train], [{"text": t, "label": y} for t, y in dev]


def _read(path: Path) -> dict[str, Task]:
    """The tasks of a file by name. A row has fields of :class:`Task`; those that it lacks are of the row that it is "like"."""
    rows: dict[str, dict[str, Any]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        rows[row["name"]] = {**rows.get(row.pop("like", ""), {}), **row}
    return {name: _task(**row) for name, row in rows.items()}


def _task(*, hub: dict[str, Any] | None = None, unpack: str | None = None, **fields: Any) -> Task:
    kept = {name: _frozen(value) for name, value in fields.items()}
    if hub is not None:
        kept["hub"] = Hub(**{name: _frozen(value) for name, value in hub.items()})
    return Task(**kept, unpack=UNPACK[unpack] if unpack is not None else None)


def _frozen(value: Any) -> Any:
    """The value with tuples in place of lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


GO_AGAIN = Task(
    language.TASK_NAME,
    "classification",
    SENTENCE,
    labels=("no", "yes"),
    prompt="{0}" + language.PROMPT,
    words=language.LABEL_WORDS,
    generate=_go_again,
    source=OWN,
)
"""The task of the embedded model, which needs no files."""

TASKS = {GO_AGAIN.name: GO_AGAIN, **_read(Path(__file__).parent / "tasks.json"), TEXT.name: TEXT}

__all__ = ["CHAT", "COMPLETION", "COMPLETION_TEXT", "GO_AGAIN", "KINDS", "TASKS", "TEXT", "Hub", "Row", "Task"]
