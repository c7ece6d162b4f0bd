"""The file of a journal that is being written. It grows by whole records, and is cut back if one cannot be written."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import weakref
from pathlib import Path

from ..errors import InputError, JournalError
from ..kernels.checks import as_integer, check_text
from ..model.files import replacing
from .format import CRC, Record, Sides, StepTaken, encode_record, frame


@dataclasses.dataclass(frozen=True)
class Tail:
    """The end of a file: its length, the checksum up to there, the last step, and whether the file has the sides of a probe."""

    length: int
    crc: int
    last: StepTaken | None = None
    sides: bool = False


class JournalFile:
    """An open journal, which no other process writes.

    Args:
        tail: the end of what is there already; what lies behind it is cut off.
        fsync: force the file onto the disk after every so many records; None: never.
    """

    def __init__(self, path: Path, descriptor: int, tail: Tail, fsync: int | None) -> None:
        self.path = path
        self.tail = tail
        self._descriptor: int | None = descriptor
        self._left = False
        self._fsync = fsync
        self._unsynced = 0
        os.ftruncate(descriptor, tail.length)
        _OPEN.add(self)

    @classmethod
    def create(cls, path: Path, header: bytes, fsync: int | None, *, overwrite: bool) -> JournalFile:
        """Makes a new file, with the whole header or not at all: a file with half of it never has the journal's name.
        Raises JournalError if it cannot be written."""
        try:
            with replacing(path, overwrite=overwrite, suffix=str(os.getpid())) as half:
                half.write_bytes(header)
                descriptor = open_alone(half)
        except FileExistsError:
            raise already_there(path) from None
        except OSError as e:
            raise JournalError(f"cannot write the journal {path}: {e.strerror}") from None
        tail = Tail(len(header), CRC.unpack_from(header, len(header) - CRC.size)[0])
        return cls(path, descriptor, tail, fsync)

    @property
    def closed(self) -> bool:
        """Whether nothing can be written any more."""
        return self._descriptor is None

    def append(self, record: Record) -> None:
        """Hands a record to the operating system. Raises JournalError if that failed; the file is then as before."""
        before = self.tail
        data, crc = frame(encode_record(record, before.last), before.crc)
        try:
            self._write(data)
            self._sync()
        except OSError as e:
            self.cut(before)
            raise JournalError(
                f"cannot write the journal {self.path}: {e.strerror}; it ends with the step before, and this one was not taken"
            ) from None
        self.tail = Tail(
            before.length + len(data),
            crc,
            record if isinstance(record, StepTaken) else before.last,
            before.sides or isinstance(record, Sides),
        )

    def cut(self, tail: Tail) -> None:
        """Cuts the file back to an earlier end."""
        self.tail = tail
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, tail.length)

    def close(self) -> None:
        """Forces the file onto the disk and closes it. A second call does nothing."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._descriptor)
            _unlock(self._descriptor)  # a process that was forked just now may not have left the file yet
            os.close(self._descriptor)
            self._descriptor = None

    def leave(self) -> None:
        """Leaves the file, and the lock on it, to the process that this one was forked from."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._left = None, True

    def _write(self, data: bytes) -> None:
        if self._descriptor is None:
            forked = "written by the process that this one was forked from: close() it here, and it stays as it is"
            raise JournalError(f"the journal {self.path} is {forked if self._left else 'closed'}")
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], self.tail.length + done)

    def _sync(self) -> None:
        self._unsynced += 1
        if self._fsync is not None and self._unsynced >= self._fsync:
            assert self._descriptor is not None
            os.fsync(self._descriptor)
            self._unsynced = 0


_OPEN: weakref.WeakSet[JournalFile] = weakref.WeakSet()


def _leave_all() -> None:
    for file in list(_OPEN):
        file.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)


def check_fsync(fsync: int | None) -> None:
    """Raises TypeError or ValueError unless ``fsync`` is None or an integer of at least 1."""
    if fsync is not None:
        as_integer("fsync", fsync, 1)


def as_path(path: str | os.PathLike[str]) -> Path:
    """The path of a journal. Raises JournalError if there can be no such path."""
    try:
        check_text("the journal", str(path))
    except InputError as e:
        raise JournalError(f"cannot open {e}") from None
    return Path(path)


def already_there(path: Path) -> JournalError:
    """The error for a name that is taken."""
    return JournalError(f"{path} is there already: resume it, give overwrite=True, or another name")


def _unlock(descriptor: int) -> None:
    """Takes the lock off a file, in whatever processes it is open."""
    with contextlib.suppress(ImportError, OSError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)


def open_alone(path: Path) -> int:
    """Opens a file for writing, and locks it. Raises JournalError if it cannot be opened, or another process writes it."""
    try:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError as e:
        raise JournalError(f"cannot open the journal {path}: {e.strerror}") from None
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return descriptor
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise JournalError(f"the journal {path} is in use by another process") from None
    return descriptor
