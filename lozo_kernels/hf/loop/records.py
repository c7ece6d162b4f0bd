"""What a run leaves behind while it goes on: metrics.jsonl and the same numbers in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from ...errors import InputError
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
    """The lines of a metrics file with what they say, without one at the end that a killed process left unfinished. Without a
    file, nothing.

    Raises:
        InputError: a line before the last one is damaged.
    """
    found: list[tuple[str, StepRecord | EvalRecord]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        record = _record(line)
        if record is not None:
            found.append((line, record))
        elif len(found) + 1 < len(lines):
            raise InputError(
                f"{path}, line {len(found) + 1}: this is no line of a run's metrics; without it and those after it, "
                "finetune --resume goes on from there"
            )
    return found


def _record(line: str) -> StepRecord | EvalRecord | None:
    """What a line says; None if it is damaged."""
    try:
        values = json.loads(line)
        kind = {"step": StepRecord, "eval": EvalRecord}[values["kind"]]
        return kind(**{f.name: _read(values[f.name], str(f.type)) for f in dataclasses.fields(kind)})
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


_KINDS: dict[str, tuple[type, ...]] = {"int": (int,), "bool": (bool,), "float": (int, float, type(None))}


def _read(value: Any, kind: str) -> Any:
    """The value of a field, whose type is given in words; a number that is null is NaN, unless there may be none."""
    if kind == "list[float]":
        return [_read(one, "float") for one in value]
    if kind == "float | None" and value is None:
        return None
    kind = kind.removesuffix(" | None")
    if type(value) not in _KINDS[kind] or (kind == "int" and value < 0):
        raise TypeError
    return value if kind != "float" else math.nan if value is None else float(value)
