"""What a run leaves behind while it goes on: metrics.jsonl and the same numbers in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ...model.files import write_whole
from ..output import to_json


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step; ``c`` has one value per direction."""

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
        upto: keep what an older one has of so many steps, without the evaluation after them.
    """

    def __init__(self, path: Path, upto: int = 0) -> None:
        kept = [(line, record) for line, record in read_metrics(path) if record.step < upto] if upto else []
        self.steps = [record for _, record in kept if isinstance(record, StepRecord)]
        self.evaluations = [record for _, record in kept if isinstance(record, EvalRecord)]
        self.skipped = sum(record.skipped for record in self.steps)
        write_whole(path, "".join(line + "\n" for line, _ in kept))
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def add_step(self, record: StepRecord) -> None:
        """Writes a line of kind "step"."""
        self.steps.append(record)
        self.skipped += record.skipped
        self._write({"kind": "step", **dataclasses.asdict(record), "outside": record.outside})

    def add_evaluation(self, record: EvalRecord) -> None:
        """Writes a line of kind "eval"."""
        self.evaluations.append(record)
        self._write({"kind": "eval", **dataclasses.asdict(record)})

    def close(self) -> None:
        self._file.close()

    def _write(self, values: dict[str, Any]) -> None:
        self._file.write(to_json(values) + "\n")


def read_metrics(path: Path) -> list[tuple[str, StepRecord | EvalRecord]]:
    """The lines of a metrics file with what they say, up to one that a killed process left unfinished. Without a file, nothing."""
    found: list[tuple[str, StepRecord | EvalRecord]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        record = _record(line)
        if record is None:
            break
        found.append((line, record))
    return found


def _record(line: str) -> StepRecord | EvalRecord | None:
    try:
        values = json.loads(line)
        kind = StepRecord if values["kind"] == "step" else EvalRecord
        found = {f.name: values[f.name] for f in dataclasses.fields(kind)}
        # JSON has no NaN: a number that was not finite was written as null.
        found |= {name: math.nan for name, value in found.items() if value is None and name != "accuracy"}
        if kind is StepRecord:
            found["c"] = [math.nan if c is None else c for c in found["c"]]
        return kind(**found)
    except (ValueError, KeyError, TypeError):
        return None
