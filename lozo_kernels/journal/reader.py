"""Reads a journal. Everything is checked, and only a record that a killed process left unfinished at the end is cut off."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import JournalError
from .format import (
    AT_REST,
    CRC,
    DECAY,
    DECAY_EACH,
    DETOUR,
    DETOUR_MOVES,
    DIGEST_BYTES,
    END,
    FLUSHED,
    GUIDES,
    HEAD,
    INDEX,
    LR,
    LR_EACH,
    MAGIC,
    MEASURED,
    MOVES,
    PREFIX,
    RETURNED,
    SETTLED,
    SIDES,
    SKIPPED,
    STEP,
    VERSION,
    WINDOW,
    Detour,
    End,
    Flushed,
    Guides,
    Header,
    Measurement,
    Record,
    Settled,
    Sides,
    StepTaken,
)


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """A journal that was read.

    Attributes:
        records: in order.
        ends: for each record, the position after it and the checksum up to there.
        start: the same for the header.
        torn: bytes of an unfinished record at the end, left by a process that was killed while it wrote it.
        source: where it was read, for messages.
    """

    header: Header
    records: list[Record]
    ends: list[tuple[int, int]]
    start: tuple[int, int]
    torn: int
    source: str

    @property
    def steps(self) -> int:
        """The number of recorded steps."""
        return sum(isinstance(r, StepTaken) for r in self.records)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the weights at the end of the run; None if the run has no end."""
        return next((r.fingerprint for r in reversed(self.records) if isinstance(r, End)), None)

    def until(self, steps: int | None) -> list[Record]:
        """Returns the records up to the step with which so many are taken; ValueError if there are not so many. None: all
        records, except for the end of the run."""
        if steps is None:
            return [r for r in self.records if not isinstance(r, End)]
        if not isinstance(steps, int):
            raise TypeError(f"upto is a number of steps or None, not {steps!r}")
        if not 0 <= steps <= self.steps:
            raise ValueError(f"{self.source} has {self.steps} steps, not {steps}")
        taken = 0
        for i, record in enumerate(self.records):
            if taken == steps:
                return self.records[:i]
            taken += isinstance(record, StepTaken)
        return self.until(None) if steps else []


def read_journal(source: str | os.PathLike[str] | bytes) -> RecordedRun:
    """Reads a journal, from a file or from bytes.

    An unfinished record at the end is left out (:attr:`RecordedRun.torn`).

    Raises:
        JournalError: it cannot be read, or is damaged; the message names the record.
    """
    if isinstance(source, bytes):
        return _read(source, "the journal")
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"a journal is read from a path or from bytes, not {source!r:.200}")
    try:
        return _read(Path(source).read_bytes(), str(source))
    except OSError as e:
        raise JournalError(f"cannot read the journal {source}: {e.strerror}") from None
    except ValueError as e:  # a NUL or a lone surrogate
        raise JournalError(f"cannot read the journal {os.fspath(source)!r}: {e}") from None


def _read(data: bytes, source: str) -> RecordedRun:
    header, start = _read_header(data, source)
    parser = _Parser(data, header, *start)
    torn = parser.run(source)
    return RecordedRun(header, parser.records, parser.ends, start, torn, source)


def _read_header(data: bytes, source: str) -> tuple[Header, tuple[int, int]]:
    if data[:8] != MAGIC:
        raise JournalError(f"{source} is not a journal of lozo_kernels")
    if len(data) < PREFIX.size:
        raise JournalError(f"{source}: the header is cut off")
    _, version, length = PREFIX.unpack_from(data)
    if version != VERSION:
        raise JournalError(f"{source} has format {version}; this version of lozo_kernels reads {VERSION}")
    end = PREFIX.size + length
    if len(data) < end + CRC.size:
        raise JournalError(f"{source}: the header is cut off")
    if CRC.unpack_from(data, end)[0] != zlib.crc32(memoryview(data)[:end]):
        raise JournalError(f"{source}: the header is damaged: its checksum is wrong")
    try:
        header = Header.from_json(data[PREFIX.size : end].decode())
    except (JournalError, UnicodeDecodeError) as e:
        raise JournalError(f"{source}: {e}") from None
    return header, (end + CRC.size, CRC.unpack_from(data, end)[0])


class _Torn(Exception):
    """The data ends within a record."""


class _Parser:
    def __init__(self, data: bytes, header: Header, position: int, crc: int) -> None:
        self.data, self.view, self.header = data, memoryview(data), header
        self.position, self.crc = position, crc
        self.records: list[Record] = []
        self.ends: list[tuple[int, int]] = []
        self._groups, self._directions = len(header.groups), header.settings["directions"]
        self._zeros = (0.0,) * self._directions
        self._last: StepTaken | None = None
        self._steps = 0
        self._guided = header.config.estimator == "guided"
        self._window: int | None = None  # of the last V that was made from inputs
        self._read: dict[int, Callable[[], Record]] = {
            SETTLED: functools.partial(self._bare, Settled()),
            FLUSHED: functools.partial(self._bare, Flushed()),
            DETOUR: self._detour,
            SIDES: self._sides,
            MEASURED: self._measurement,
            GUIDES: self._guides,
            END: self._end,
        }

    def run(self, source: str) -> int:
        """Reads all records. Returns the number of bytes of an unfinished one."""
        while self.position < len(self.data):
            start = self.position
            try:
                if self.records and isinstance(self.records[-1], End):
                    raise JournalError("it comes after the end of the run")
                self._next()
            except _Torn:
                return len(self.data) - start
            except JournalError as e:
                step = self.header.first_step + self._steps
                where = f"record {len(self.records)} (at byte {start}, before or of step {step})"
                raise JournalError(f"{source}: {where} is damaged: {e}") from None
        return 0

    def _next(self) -> None:
        kind = self.data[self.position]
        if kind & STEP:
            record: Record = self._step(kind)
            if self._guided and self._window != self._due:
                raise JournalError(f"there is no V of its window, {self._due}")
            self._steps += 1
            self._last = record  # type: ignore[assignment]
        elif kind in self._read:
            record = self._read[kind]()
        else:
            raise JournalError(f"kind {kind} is not known")
        self.records.append(record)
        self.ends.append((self.position, self.crc))

    def _take(self, size: int) -> memoryview:
        """Returns the next bytes, after it has compared their checksum, which follows them."""
        end = self.position + size
        if end + CRC.size > len(self.data):
            raise _Torn
        body = self.view[self.position : end]
        crc = zlib.crc32(body, self.crc)
        if CRC.unpack_from(self.data, end)[0] != crc:
            raise JournalError("its checksum is wrong")
        self.position, self.crc = end + CRC.size, crc
        return body

    def _step(self, kind: int) -> StepTaken:
        skipped = bool(kind & SKIPPED)
        sizes = []
        for given, each in ((LR, LR_EACH), (DECAY, DECAY_EACH)):
            if kind & each and (not kind & given or self._groups == 1):
                raise JournalError("its flags contradict each other")
            sizes.append(0 if not kind & given else self._groups if kind & each else 1)
        if kind & RETURNED and not kind & AT_REST:
            raise JournalError("its flags contradict each other")
        count = sum(sizes) + (0 if skipped else self._directions)
        numbers = struct.unpack_from(f"<{count}d", self._take(1 + 8 * count), 1)
        if not all(map(math.isfinite, numbers)):
            raise JournalError("it has a number that is not finite")
        last = self._last
        lr, decay = numbers[: sizes[0]], numbers[sizes[0] : sum(sizes)]
        if last is None and not all(sizes):
            raise JournalError("the first step has no learning rate")
        return StepTaken(
            self._zeros if skipped else numbers[sum(sizes) :],
            self._each(lr) if lr or last is None else last.lr,
            self._each(decay) if decay or last is None else last.weight_decay,
            skipped,
            bool(kind & AT_REST),
            bool(kind & RETURNED),
        )

    def _measurement(self) -> Measurement:
        if self.position + MOVES.size > len(self.data):
            raise _Torn
        count = MOVES.unpack_from(self.data, self.position)[1]
        if not 1 <= count <= self._directions:
            raise JournalError(f"a measurement of {count} directions")
        numbers = struct.unpack_from(f"<{4 * count}d", self._take(MOVES.size + 32 * count), MOVES.size)
        if not all(map(math.isfinite, numbers)):
            raise JournalError("it has a number that is not finite")
        return Measurement(tuple(numbers[i : i + 4] for i in range(0, 4 * count, 4)))

    def _detour(self) -> Detour:
        moves = DETOUR_MOVES.unpack_from(self._take(DETOUR_MOVES.size))[1]
        if not 1 <= abs(moves) <= 2 * self._directions:
            raise JournalError(f"a detour of {abs(moves)} moves")
        return Detour(abs(moves), moves < 0)

    def _end(self) -> End:
        return End(bytes(self._take(1 + DIGEST_BYTES)[1:]).hex())

    def _bare(self, record: Record) -> Record:
        self._take(1)
        return record

    def _each(self, values: tuple[float, ...]) -> tuple[float, ...]:
        return values * self._groups if len(values) == 1 else values

    @property
    def _due(self) -> int:
        """The window of the next step."""
        return (self.header.first_step + self._steps) // self.header.config.interval

    def _guides(self) -> Guides:
        body = self._long()
        if len(body) < WINDOW.size or not self._guided or self._window == self._due:
            raise JournalError("there is no V of inputs here")
        window = WINDOW.unpack_from(body)[0]
        if window != self._due:
            raise JournalError(f"it is the V of window {window}, and the next step is in window {self._due}")
        self._window = window
        return Guides(window, tuple(self._vs(body[WINDOW.size :])))

    def _vs(self, body: memoryview) -> Iterator[tuple[int, bytes]]:
        parameters, rank, before = self.header.parameters, self.header.config.rank, -1
        while body:
            index = INDEX.unpack_from(body)[0] if len(body) >= INDEX.size else -1
            if not before < index < len(parameters) or parameters[index].kind != "lowrank" or len(parameters[index].shape) != 2:
                raise JournalError("its V is of no matrix of the run")
            end, before = INDEX.size + 2 * rank * parameters[index].shape[1], index
            if len(body) < end:
                raise JournalError(f"the V of {parameters[index].name!r} is cut off")
            yield index, bytes(body[INDEX.size : end])
            body = body[end:]

    def _sides(self) -> Sides:
        if self.records and isinstance(self.records[-1], Sides):  # later in a run they may change
            raise JournalError("the sides are there already")
        try:
            described = json.loads(bytes(self._long()).decode())
        except (ValueError, RecursionError) as e:
            raise JournalError(f"it is no JSON: {str(e)[:200]}") from None
        _check_sides(described, len(self.header.parameters))
        return Sides(described)

    def _long(self) -> memoryview:
        """Returns what follows the head of a long record, as :meth:`_take` does."""
        if self.position + HEAD.size > len(self.data):
            raise _Torn
        _, length, check = HEAD.unpack_from(self.data, self.position)
        body = self.position + HEAD.size
        crc = zlib.crc32(self.view[self.position : body - CRC.size], self.crc)
        if crc != check:
            raise JournalError("the checksum of its length is wrong")
        if body + length + CRC.size > len(self.data):
            raise _Torn
        crc = zlib.crc32(self.view[body : body + length], crc)
        if CRC.unpack_from(self.data, body + length)[0] != crc:
            raise JournalError("its checksum is wrong")
        self.position, self.crc = body + length + CRC.size, crc
        return self.view[body : body + length]


def _check_sides(described: Any, parameters: int) -> None:
    rows = described.get("sides") if isinstance(described, dict) else None
    if not isinstance(rows, list) or len(rows) != parameters or not isinstance(described.get("precision"), str):
        raise JournalError("the sides are not those of the parameters")
    for row in rows:
        good = isinstance(row, list) and len(row) == 3 and isinstance(row[0], str)
        scopes, layer = (row[1], row[2]) if good else (None, None)
        good = good and (scopes is None or (isinstance(scopes, list) and all(isinstance(s, str) for s in scopes)))
        if not good or not (layer is None or (type(layer) is int and 0 <= layer < parameters)):
            raise JournalError("the sides are not described as such")
