"""What a run leaves behind while it goes on: metrics.jsonl and the same numbers in memory."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
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
        upto: keep what an older one has of so many steps, without the evaluation after them.
    """

    def __init__(self, path: Path, upto: int = 0) -> None:
        self.steps: list[StepRecord] = []
        self.evaluations: list[EvalRecord] = []
        self.skipped = 0
        kept = [(line, record) for line, record in read_metrics(path) if record.step < upto] if upto else []
        for _, record in kept:
            if isinstance(record, StepRecord):
                self.steps.append(record)
                self.skipped += record.skipped
            else:
                self.evaluations.append(record)
        half = path.with_name(f".{path.name}")
        half.write_text("".join(line + "\n" for line, _ in kept), encoding="utf-8")
        half.replace(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

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


def read_metrics(path: Path) -> list[tuple[str, StepRecord | EvalRecord]]:
    """The lines of a metrics file with what they say, up to one that a killed process left unfinished; none without a file."""
    found: list[tuple[str, StepRecord | EvalRecord]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            kind = StepRecord if values["kind"] == "step" else EvalRecord
            found.append((line, kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)})))
        except (ValueError, KeyError, TypeError):
            break
    return found


def write_whole(path: Path, text: str) -> None:
    """A file with all of the text or, if that cannot be written, as it was."""
    half = path.with_name(f".{path.name}")
    try:
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def unwritable(error: BaseException) -> str | None:
    """Why results could not be written, if that is what an error says: the disk is full, the quota used up, or read-only."""
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return error.strerror
    if type(error).__name__ == "SafetensorError":  # has no number, only the operating system's words and "(os error 28)"
        return next((os.strerror(code) for code in _NO_PLACE if f"os error {code})" in str(error)), None)
    return None


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
