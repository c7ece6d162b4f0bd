"""Finds the first difference of two journals."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from .format import Record, StepTaken
from .reader import RecordedRun, read_journal

Source = str | os.PathLike[str] | bytes | RecordedRun


@dataclasses.dataclass(frozen=True)
class Difference:
    """The first difference of two journals.

    Attributes:
        record: number of the record from 0; None in the header.
        step: number of steps before the record; None in the header.
        field: what differs: a field of the header or of the record, or "record" if they are of different kinds, or one is missing.
        first, second: the values; None if there is no such record.
    """

    record: int | None
    step: int | None
    field: str
    first: Any
    second: Any

    def __str__(self) -> str:
        where = "the header" if self.record is None else f"record {self.record} (after {self.step} steps)"
        return f"{where} differs in {self.field}: {_shown(self.first)} | {_shown(self.second)}"


def diff(first: Source, second: Source) -> Difference | None:
    """Returns the first difference of two journals, or None. Versions and notes, which do not determine the bits, are ignored.

    Raises:
        JournalError: one cannot be read.
    """
    a, b = (run if isinstance(run, RecordedRun) else read_journal(run) for run in (first, second))
    return _headers(a, b) or _records(a, b)


def _headers(a: RecordedRun, b: RecordedRun) -> Difference | None:
    ignored = ("backend", "side", "allow_drift")
    one, two = ({k: v for k, v in run.header.config.to_dict().items() if k not in ignored} for run in (a, b))
    for name in one:
        if one[name] != two[name]:
            return Difference(None, None, f"config.{name}", one[name], two[name])
    for name, value in a.header.settings.items():
        if value != b.header.settings[name]:
            return Difference(None, None, f"settings.{name}", value, b.header.settings[name])
    for p, q in zip(a.header.parameters, b.header.parameters, strict=False):
        for field in dataclasses.fields(p):
            x, y = getattr(p, field.name), getattr(q, field.name)
            if x != y:
                return Difference(None, None, f"{field.name} of {p.name}", x, y)
    for name in ("noise_version", "first_step", "groups", "parameters"):
        x, y = getattr(a.header, name), getattr(b.header, name)
        if x != y:
            return Difference(None, None, name, x, y)
    return None


def _records(a: RecordedRun, b: RecordedRun) -> Difference | None:
    step = a.header.first_step
    for i in range(max(len(a.records), len(b.records))):
        x, y = (run.records[i] if i < len(run.records) else None for run in (a, b))
        if x != y:
            return _of_record(i, step, x, y)
        step += isinstance(x, StepTaken)
    return None


def _of_record(i: int, step: int, x: Record | None, y: Record | None) -> Difference:
    if x is None or y is None or type(x) is not type(y):
        return Difference(i, step, "record", x and type(x).__name__, y and type(y).__name__)
    for name, p, q in zip(x._fields, x, y, strict=True):
        if p != q:
            return Difference(i, step, name, p, q)
    raise AssertionError("records that differ differ in a field")


def _shown(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 200 else text[:200] + "..."
