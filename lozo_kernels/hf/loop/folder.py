"""The folder of a run: it belongs to one run at a time, and what is in it stays unless the user gives it up."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import InputError, JournalError, require
from ...journal import read_journal
from ...model.files import write_whole
from ..output import make_folder, read_object
from .records import StepRecord, read_metrics

JOURNAL, METRICS, SUMMARY = "run.journal", "metrics.jsonl", "summary.json"
MODEL, PLOT = "model", "loss.png"
BEST = "best.safetensors"
"""Weights of the best evaluation, while the run goes on."""
EXTENDED = "extended.json"
"""How many steps a run is to take that was given more than its journal says."""
_RESULTS = (SUMMARY, JOURNAL, METRICS, BEST, EXTENDED, PLOT, MODEL)
LOCK = ".lock"
"""A file that the process of a run has locked. It stays behind: a file that is removed could be locked twice."""


@contextlib.contextmanager
def claimed(
    output: Path,
    *,
    inputs: Iterable[str | None] = (),
    going_on: bool = False,
    overwrite: bool = False,
    numbered: bool = False,
    contents: Callable[[Path], str | None] | None = None,
) -> Iterator[Path]:
    """Has a folder for itself until the block ends. Nothing but the folder and its lock is touched here.

    Args:
        output: the folder; it is made where there is none.
        inputs: what is read: files, folders or names on the Hub. None of them may be what is written.
        going_on: the run in the folder is what goes on.
        overwrite: what an earlier run left there may be replaced.
        numbered: the user gave no name, so that a folder that is taken is passed over: ``output``, ``output-2``, ``output-3``, ...
        contents: says what there is to lose in a folder, None for nothing; :func:`find_run` without it.

    Raises:
        InputError: the folder is in use, holds the results of a run or what is read, or cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for number in itertools.count(1):
            folder = output if number == 1 else output.with_name(f"{output.name}-{number}")
            if not stack.enter_context(_locked(folder)):
                if numbered:
                    continue
                raise InputError(f"--output {folder}: another process is writing there; wait for it, or give another folder")
            found = None if going_on or overwrite else (contents or find_run)(folder)
            if found is None:
                break
            if not numbered:
                raise InputError(f"--output {folder} {found}; give another folder, or --overwrite to lose that")
        _check_kinds(folder)
        for name in inputs:
            check_input(folder, name)
        yield folder


def find_run(folder: Path) -> str | None:
    """What an earlier run left in a folder, for a message; None if nothing would be lost."""
    summary = read_saved(folder / SUMMARY)
    try:
        steps = read_journal(folder / JOURNAL).steps if (folder / JOURNAL).is_file() else 0
    except JournalError:
        return f"holds a journal ({JOURNAL}) that cannot be read"
    if steps and (not summary or summary.get("stopped")):
        return f"holds a run of {steps} steps, which lozo-kernels finetune --resume {folder} goes on with"
    if (folder / SUMMARY).is_file():
        return "holds a finished run"
    if (folder / MODEL).is_dir():
        return "holds a model"
    try:
        steps = sum(isinstance(record, StepRecord) for _, record in read_metrics(folder / METRICS))
    except InputError:
        return f"holds a file {METRICS} that is damaged, or of something else"
    return f"holds the metrics of a run of {steps} steps" if steps else None


def begin(folder: Path, *, going_on: bool, extended: int | None = None) -> None:
    """Prepares a folder for a run: the summary goes first, which says that all the rest is whole.

    Args:
        going_on: the run in the folder goes on; a new one finds nothing of another.
        extended: steps in all of a run that goes on for longer than its journal says.
    """
    (folder / SUMMARY).unlink(missing_ok=True)
    if extended is not None:
        write_whole(folder / EXTENDED, json.dumps({"steps": extended}) + "\n")
    if going_on:
        return
    for path in _results(folder):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_saved(path: Path) -> dict[str, Any]:
    """A JSON object that a run saved; empty where there is none that can be read."""
    with contextlib.suppress(InputError):
        return read_object(path)
    return {}


def check_input(folder: Path, name: str | None) -> None:
    """Raises InputError if what is read is what a run in this folder writes."""
    path = None if name is None else Path(name)
    if path is None or not path.exists():
        return
    read, written = path.resolve(), [result.resolve() for result in _results(folder)]
    if any(read == target or target in read.parents for target in written):
        raise InputError(f"--output {folder}: {name} is in it, and would be replaced while it is read; give another folder")


def _results(folder: Path) -> list[Path]:
    """What a run writes there: results by their names, and its checkpoints."""
    return [*(folder / name for name in _RESULTS), *folder.glob("checkpoint-*")]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Makes and locks a folder, if no process has; gives whether it did. Folders that were made for it and stayed empty go."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    filelock = require("filelock")
    lock = filelock.FileLock(str(folder / LOCK))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    except OSError as e:
        raise InputError(f"--output {folder}: {e.strerror}") from None
    try:
        yield True
    finally:
        if made and [path.name for path in folder.iterdir()] == [LOCK]:  # while it is locked, so that nobody else has it
            (folder / LOCK).unlink()
            with contextlib.suppress(OSError):  # somebody else has begun to write there
                for path in made:
                    path.rmdir()
        lock.release()


def _check_kinds(folder: Path) -> None:
    for name in _RESULTS:
        if (folder / name).exists() and (folder / name).is_dir() != (name == MODEL):
            kind = "a folder" if name == MODEL else "a file"
            raise InputError(f"--output {folder}: {name} is in the way, where {kind} of that name is to be written")
