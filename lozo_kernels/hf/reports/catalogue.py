"""What there is to choose from: tasks, methods and objectives."""

from __future__ import annotations

from typing import Any

from ..methods import METHODS
from ..objectives import OBJECTIVES
from ..tables import table
from ..tasks import TASKS

_FILES = {"image": "--data-dir"}


def catalogue() -> dict[str, Any]:
    """Tasks, methods and objectives by their names, as plain values."""
    tasks = {
        name: {
            "kind": task.kind,
            "classes": len(task.labels) or None,
            "metrics": list(task.metrics),
            "data": task.hub.path
            if task.hub
            else "its generator"
            if task.generate
            else "--data-dir"
            if task.kind == "image"
            else "--train-file",
        }
        for name, task in TASKS.items()
    }
    methods = {
        name: {
            "label": method.label,
            "kind": method.kind,
            "lr": method.lr if method.trains else None,
            "settings": list(method.uses),
        }
        for name, method in METHODS.items()
    }
    objectives = {
        name: {"meaning": (kind.__doc__ or "").splitlines()[0], "unit": kind.unit, "model": kind.auto_model}
        for name, kind in OBJECTIVES.items()
    }
    return {"tasks": tasks, "methods": methods, "objectives": objectives}


def render_catalogue(found: dict[str, Any]) -> str:
    """The catalogue for a reader."""
    tasks = [
        [name, task["kind"], str(task["classes"] or ""), ", ".join(task["metrics"]), task["data"]]
        for name, task in found["tasks"].items()
    ]
    methods = [
        [name, method["label"], method["kind"], "" if method["lr"] is None else f"{method['lr']:g}"]
        for name, method in found["methods"].items()
    ]
    objectives = [[name, objective["meaning"]] for name, objective in found["objectives"].items()]
    parts = [
        ("--task", [["task", "kind", "classes", "metrics", "data"], *tasks]),
        ("--method", [["method", "in papers", "kind", "--lr of large models"], *methods]),
        ("--objective", [["objective", "what is minimised"], *objectives]),
    ]
    return "\n\n".join(f"{option}\n{table(rows, left=len(rows[0]), folded=True)}" for option, rows in parts)
