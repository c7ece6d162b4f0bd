"""One run of the command line by several processes that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from ...errors import InputError
from ..methods import METHODS
from ..together import check_parts
from .meeting import join

if TYPE_CHECKING:
    from ..settings import Settings

T = TypeVar("T")


def counted() -> tuple[int, int]:
    """(rank, number) of this process among those that torchrun started; (0, 1) without it."""
    try:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as e:
        raise InputError(f"the variables RANK and WORLD_SIZE, which torchrun sets, are numbers: {e}") from None


def is_first() -> bool:
    """Whether this process is the one that prints and saves."""
    return counted()[0] == 0


def part(rows: Sequence[T], parallel: str | None) -> Sequence[T]:
    """This process's examples of a batch: neighbours. The first processes have one more if the examples do not divide evenly."""
    rank, size = counted()
    if parallel != "examples" or size == 1:
        return rows
    least, more = divmod(len(rows), size)
    start = rank * least + min(rank, more)
    return rows[start : start + least + (rank < more)]


@contextlib.contextmanager
def joined(settings: Settings) -> Iterator[Settings]:
    """Joins the group of processes and gives the settings of this one, which have a device of their own.

    A process that is alone gets the settings as they are, without ``parallel``.

    Raises:
        InputError: these settings cannot be run by several processes.
    """
    rank, size = counted()
    if size == 1:
        yield dataclasses.replace(settings, parallel=None)
        return
    _check(settings, size)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = settings.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{local % torch.cuda.device_count()}"
    settings = dataclasses.replace(settings, parallel=settings.parallel or "examples", device=device, compare_steps=0)
    join(rank, size)
    try:
        yield settings
    finally:
        distributed.destroy_process_group()


def first_does(work: Callable[[], T]) -> T:
    """What a call returns in the first process, which alone makes it.

    Raises:
        InputError: the call raised it, in every process.
    """
    if counted()[1] == 1:
        return work()
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if is_first():
        try:
            told = [(work(), None)]
        except InputError as e:
            told = [(None, str(e))]
    distributed.broadcast_object_list(told)
    result, error = told[0]
    if error is not None:
        raise InputError(error)
    return result  # type: ignore[return-value]


@contextlib.contextmanager
def own_folder(shared: Path, *, copied: bool) -> Iterator[Path]:
    """The folder that this process writes: the shared one in the first process, elsewhere one that is thrown away at the end.

    Args:
        copied: what is in the shared folder is in the others too, to go on with.
    """
    if counted()[1] == 1:
        yield shared
        return
    with tempfile.TemporaryDirectory() as folder:
        own = shared
        if not is_first():
            own = Path(folder) / "run"
            own.mkdir()
            if copied:
                shutil.copytree(shared, own, ignore=shutil.ignore_patterns("model", ".*"), dirs_exist_ok=True)
        distributed.barrier()  # the first process writes only now to what the others have copied
        yield own


def _check(settings: Settings, size: int) -> None:
    if METHODS[settings.method].kind != "zeroth-order":
        raise InputError(f"--method {settings.method} runs in one process: start it without torchrun")
    if settings.find_eps:
        raise InputError("--find-eps is for one process: start it once without torchrun, and give what it finds as --eps")
    if settings.parallel == "directions" and settings.directions < size:
        raise InputError(f"--parallel directions: {size} processes need --directions {size} or more, not {settings.directions}")
    check_parts(settings, size)
    if settings.parallel != "directions" and settings.batch_size < size:
        raise InputError(f"--batch-size {settings.batch_size} is less than one example for each of {size} processes")
