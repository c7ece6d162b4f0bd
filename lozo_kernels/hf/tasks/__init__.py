"""The table of tasks, one file for each kind. A new task is a new row; nothing else in the package knows a task by its name."""

from __future__ import annotations

from . import choice, classification, generation, images
from .task import KINDS, Hub, Row, Task

TEXT = Task("text", "causal_lm", classification.SENTENCE, objective="lm", metrics=(), source="this project")
"""Language modelling on one field of any file."""

TASKS = {t.name: t for t in (*classification.ROWS, *choice.ROWS, *generation.ROWS, *images.ROWS, TEXT)}

__all__ = ["KINDS", "TASKS", "TEXT", "Hub", "Row", "Task"]
