"""One run of the command line by several processes that torchrun started."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import distributed

from ...errors import InputError
from ..methods import METHODS
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
def joined(settings: Settings, resume: bool) -> Iterator[Settings]:
    """Joins the group of processes and gives the settings of this one.

    They have a device of their own and, on all but the first process, an output folder that is thrown away at the end. A process
    that is alone gets the settings as they are, without ``parallel``.

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
        with tempfile.TemporaryDirectory() as folder:
            if rank:
                output = Path(folder) / "run"
                if resume:
                    shutil.copytree(str(settings.output), output, ignore=shutil.ignore_patterns("model"))
                settings = dataclasses.replace(settings, output=str(output))
            distributed.barrier()  # the first process writes only now to what the others have copied
            yield settings
    finally:
        distributed.destroy_process_group()


def _check(settings: Settings, size: int) -> None:
    if METHODS[settings.method].kind != "zeroth-order":
        raise InputError(f"--method {settings.method} runs in one process: start it without torchrun")
    if settings.parallel == "directions" and settings.directions < size:
        raise InputError(f"--parallel directions: {size} processes need --directions {size} or more, not {settings.directions}")
    if settings.parallel != "directions" and settings.batch_size < size:
        raise InputError(f"--batch-size {settings.batch_size} is less than one example for each of {size} processes")
