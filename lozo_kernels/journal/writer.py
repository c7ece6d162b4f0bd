"""Writes the journal of a run, and resumes a run from its journal."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from ..errors import JournalError
from ..model.contract import version_of
from ..optim.optimizer import ZerothOrderOptimizer
from ..optim.steps import StepInfo
from .arrivals import Arrival, send
from .describe import describe_groups, describe_parameters, made_with
from .file import JournalFile, Tail, already_there, as_path, check_fsync, open_alone
from .fingerprint import fingerprint
from .format import Detour, End, Flushed, Guides, Header, Measurement, Record, Settled, Sides, StepTaken, encode_header
from .reader import read_journal
from .replaying import check_fits, retake

LATE = 16
"""The most records that wait for a GPU's numbers before the writer waits."""


@dataclasses.dataclass
class _Waiting:
    """A record to be written. The numbers of a step may still be on their way."""

    number: int
    record: Record | Arrival


class Journal:
    """The journal of a run in progress. Made by :meth:`create`, or taken up again by :meth:`resume`.

    The operating system has every step before the weights move, so that a killed process loses none; on a GPU, where nothing
    waits for numbers, at most :data:`LATE` are on their way. Changes of weights by other code than the optimiser are not in a
    journal, and a replay then ends in other weights, which :func:`verify` finds.

    Example::

        optimizer = LOZO(model, lr=1e-6, placement="probe")
        with Journal.create("run.journal", optimizer):
            for batch in loader:
                optimizer.step(lambda: model(**batch).loss)
    """

    def __init__(self, file: JournalFile, optimizer: ZerothOrderOptimizer, header: Header) -> None:
        self.header = header
        self._file = file
        self._optimizer = optimizer
        self._queue: deque[_Waiting] = deque()
        self._number = 0
        self._detours: list[Detour] = []
        self._mark: tuple[int, list[Detour]] = (
            0,
            [],
        )  # of the last step: the number of its first record, and the detours before it
        self._before_mark: Tail | None = None
        self._choices: int | None = optimizer.handle.choices  # as they were when sides were written
        optimizer.journal = self
        optimizer.handle.on_merge, optimizer.handle.on_guides = self._add_merge, self._add_guides

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self._file.path

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        optimizer: ZerothOrderOptimizer,
        *,
        about: dict[str, Any] | None = None,
        overwrite: bool = False,
        fsync: int | None = None,
    ) -> Journal:
        """Begins a journal of an optimiser that has taken no step, and attaches it (``optimizer.journal``).

        Sharded weights are gathered for their fingerprints, here and in :meth:`finish`: every process has to have a journal.

        Args:
            path: the file, of this process alone.
            about: notes to keep in it, plain JSON.
            overwrite: replace a file that is there.
            fsync: force the file onto the disk after every so many records, in case the machine loses power. None leaves that to
                the operating system, which is enough if only the process is killed.

        Raises:
            JournalError: the file is there already or cannot be written, or the run cannot be rebuilt from a journal (momentum is
                there already).
        """
        path, handle = as_path(path), optimizer.handle
        check_fsync(fsync)
        if optimizer.journal is not None:
            raise JournalError("the optimiser has a journal already")
        if path.exists() and not overwrite:
            raise already_there(path)
        if optimizer.steps_done and optimizer.momentum:
            raise JournalError(f"momentum of {optimizer.steps_done} steps is in no journal: begin it before the first step")
        if optimizer.steps_done and optimizer.stepper.settings.normalise == "scalar":
            raise JournalError(f"the mean of c^2 of {optimizer.steps_done} steps is in no journal: begin it before the first step")
        notes = _plain(about)
        optimizer.flush()
        handle.merge()
        header = Header(
            handle.config,
            optimizer.stepper.settings.of_run,
            describe_parameters(handle),
            describe_groups(optimizer),
            version_of(handle.config, optimizer.stepper.settings.of_run),
            optimizer.steps_done,
            made_with(handle),
            notes,
        )
        journal = cls(JournalFile.create(path, encode_header(header), fsync, overwrite=overwrite), optimizer, header)
        guidance = handle.guidance
        if guidance is not None and guidance.window == optimizer.steps_done // handle.config.interval:
            journal._add_guides(guidance.window, guidance.vs)
        return journal

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        optimizer: ZerothOrderOptimizer,
        *,
        upto: int | None = None,
        check_weights: bool = True,
        fsync: int | None = None,
    ) -> int:
        """Brings an optimiser on the base model to where a run ended or was killed, and goes on writing its journal.

        Weights, momentum, what a probe learned, and its sides are those of the run, in every bit. The settings of the optimiser's
        groups stay as they are: let a schedule take as many steps.

        Args:
            path: the journal.
            optimizer: with the run's settings, on the model that the run started from.
            upto: go on after so many steps, and cut off the rest; None: all. Steps count from the beginning of the journal.
            check_weights: compare the weights' fingerprints.
            fsync: as in :meth:`create`.

        Returns:
            The step to go on with, ``optimizer.steps_done``.

        Raises:
            JournalError: the journal is damaged, of another run, or in use; weights and file are untouched.
            ValueError: it has fewer steps than ``upto``.
        """
        path = as_path(path)
        check_fsync(fsync)
        descriptor = open_alone(path)
        try:
            run = read_journal(path)
            records = run.until(upto)
            check_fits(run, optimizer, weights=check_weights)
            retake(optimizer, records)
            sides = next((r for r in reversed(records) if isinstance(r, Sides)), None)
            if sides is not None:
                optimizer.handle.adopt_sides(sides.described, install=True)
            length, crc = run.ends[len(records) - 1] if records else run.start
            last = next((r for r in reversed(records) if isinstance(r, StepTaken)), None)
            file = JournalFile(path, descriptor, Tail(length, crc, last, sides is not None), fsync)
        except BaseException:
            os.close(descriptor)
            raise
        cls(file, optimizer, run.header)
        return optimizer.steps_done

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()

    def add_step(self, info: StepInfo) -> None:
        """Raises JournalError if the record cannot be written, or a setting of the optimiser is no longer that of the journal."""
        optimizer = self._optimizer
        if optimizer.stepper.settings.of_run != self.header.settings or len(optimizer.param_groups) != len(self.header.groups):
            raise JournalError("a setting of the optimiser changed that a journal has once: put it back, or begin another journal")
        self._mark, self._before_mark = (self._number, list(self._detours)), None
        try:
            choices = optimizer.handle.choices
            if choices != self._choices or not self._has_sides():
                described = optimizer.handle.describe_sides()
                if described is not None:
                    self._put(Sides(described))
            at_rest, returned = self._put_detours(optimizer)
            if optimizer.stepper.measured:
                self._put(Measurement(tuple(map(tuple, optimizer.stepper.measured))))
            self._put(send(optimizer, info, at_rest=at_rest, returned=returned))
            self._drain()
            self._choices = choices
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        number, self._detours = self._mark
        self._choices = None  # perhaps sides are taken back
        while self._queue and self._queue[-1].number >= number:
            self._queue.pop()
        if self._before_mark is not None:
            self._file.cut(self._before_mark)
            self._before_mark = None

    def add_flush(self) -> None:
        self._tell(Flushed())

    def add_detour(self, moves: int, *, measuring: bool) -> None:
        """The record is written with the next step; a run that is killed before that goes on without it."""
        if self._optimizer.handle.moves_weights:
            self._detours.append(Detour(moves, measuring))

    def finish(self) -> None:
        """Ends the run: merges what was learned, writes the weights' fingerprint, and closes the file. A second call does nothing.

        A run that is resumed later goes on as if this had not happened.

        Raises:
            JournalError: the file cannot be written. The weights are those of the end all the same.
        """
        if self._file.closed:
            return
        self._detach()
        try:
            self._optimizer.flush()
            self._optimizer.handle.merge()
            self._write_detours()
            self._put(End(fingerprint(self._optimizer.handle)))
            self._drain(wait=True)
        finally:
            self._file.close()

    def close(self) -> None:
        """Writes what is waiting and closes the file, without an end of the run. A second call does nothing.

        A forked process leaves the file to the process that it was forked from.
        """
        self._detach()
        if self._file.closed:
            return
        try:
            self._write_detours()
            self._drain(wait=True)
        finally:
            self._file.close()

    def _detach(self) -> None:
        if self._optimizer.journal is not self:
            return
        self._optimizer.journal = None
        self._optimizer.handle.on_merge = self._optimizer.handle.on_guides = None

    def _add_merge(self) -> None:
        self._tell(Settled())

    def _add_guides(self, window: int, vs: Mapping[str, Tensor]) -> None:
        due = self._optimizer.steps_done // self.header.config.interval
        if window != due:
            raise JournalError(f"V of window {window} is asked for, and the next step that is recorded is in window {due}")
        index = {name: i for i, name in enumerate(self._optimizer.handle.names)}
        rows = sorted((index[name], v.contiguous().numpy().tobytes()) for name, v in vs.items())
        self._tell(Guides(window, tuple(rows)))

    def _tell(self, record: Record) -> None:
        """Writes the record of what is about to be done. If this raises, it must not be done."""
        self._put(record)
        try:
            self._drain()
        except BaseException:
            if self._queue and self._queue[-1].record is record:
                self._queue.pop()
            raise

    def _has_sides(self) -> bool:
        return self._file.tail.sides or any(isinstance(waiting.record, Sides) for waiting in self._queue)

    def _put_detours(self, optimizer: ZerothOrderOptimizer) -> tuple[bool, bool]:
        """Queues the detours since the last step. Returns the step's flags: made at rest, and after one round and back."""
        at_rest = optimizer.handle.backward is not None and optimizer.handle.moves_weights
        whole = optimizer.directions * (2 if optimizer.two_sided else 1)
        returned = at_rest and self._detours[-1:] == [Detour(whole)]
        if returned:
            self._detours.pop()
        self._write_detours()
        return at_rest, returned

    def _write_detours(self) -> None:
        for detour in self._detours:
            self._put(detour)
        self._detours = []

    def _put(self, record: Record | Arrival) -> None:
        self._queue.append(_Waiting(self._number, record))
        self._number += 1

    def _drain(self, *, wait: bool = False) -> None:
        """Writes what is waiting, in order, as far as its numbers have arrived."""
        while self._queue:
            record = self._queue[0].record
            if isinstance(record, Arrival):
                if wait or len(self._queue) > LATE:
                    record.wait()
                elif not record.ready():
                    return
                record = record.step()
            if self._queue[0].number == self._mark[0]:
                self._before_mark = self._file.tail
            self._file.append(record)
            self._queue.popleft()


def _plain(about: dict[str, Any] | None) -> dict[str, Any]:
    """Returns notes as they will be read."""
    if about is not None and not isinstance(about, dict):
        raise TypeError(f"about is a dict of notes, not {about!r:.200}")
    try:
        return json.loads(json.dumps(about or {}, allow_nan=False))  # type: ignore[no-any-return]
    except (TypeError, ValueError, RecursionError) as e:
        raise TypeError(f"about is plain JSON, and this is not: {e}") from None
