"""What a run leaves behind while it goes on: metrics.jsonl and the same numbers in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step. ``outside`` is the share of the step spent outside its forward passes; ``c`` has one value per direction."""

    step: int
    loss: float
    c: list[float]
    lr: float
    step_ms: float
    forwards_ms: float
    skipped: bool

    @property
    def outside(self) -> float:
        """Share of the step spent outside its forward passes."""
        return max(0.0, 1.0 - self.forwards_ms / self.step_ms) if self.step_ms else 0.0


@dataclasses.dataclass(frozen=True)
class EvalRecord:
    """One evaluation on the dev examples, after ``step`` steps. ``accuracy`` is None in language modelling."""

    step: int
    loss: float
    accuracy: float | None
    examples: int
    seconds: float


class MetricsLog:
    """Steps and evaluations, each written to the file as soon as it is known.

    Args:
        path: the file; an older one is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.skipped = 0
        self._file = path.open("w", encoding="utf-8", buffering=1)

    def add_step(self, record: StepRecord) -> None:
        """One line of kind "step"."""
        self.steps.append(record)
        self.skipped += record.skipped
        self._write({"kind": "step", **dataclasses.asdict(record), "outside": record.outside})

    def add_evaluation(self, record: EvalRecord) -> None:
        """One line of kind "eval"."""
        self.evaluations.append(record)
        self._write({"kind": "eval", **dataclasses.asdict(record)})

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(to_json(values) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is not finite becomes null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with None in place of every number that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
