"""Files that are replaced whole: a crash, a kill or a full disk leaves the old file or the new one, never half of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@contextlib.contextmanager
def replacing(path: Path, *, overwrite: bool = True, suffix: str = "part") -> Iterator[Path]:
    """Gives a hidden file in the folder of ``path`` to write; after the block it is forced onto the disk and renamed to ``path``.

    If the block raises, the hidden file is removed and ``path`` stays as it was. After a kill the hidden file stays, and the next
    call with the same suffix writes over it.

    Args:
        overwrite: replace a file that exists already.
        suffix: makes the name of the hidden file. Processes or threads that may write the same file at once need different ones.

    Raises:
        FileExistsError: ``path`` exists, or another process was faster, and ``overwrite`` is false.
        OSError: the file cannot be written.
    """
    if path.exists() and not path.is_file() and not path.is_dir():  # a device or a pipe takes what is written and is not replaced
        yield path
        return
    part = path.with_name(f".{path.name}.{suffix}")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite or not _link(part, path):
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives a hidden folder beside ``path`` to fill; after the block its files are forced onto the disk, and it gets the name.

    If the block raises, the hidden folder is removed and ``path`` stays as it was. No system exchanges two folders in one step
    everywhere, so a kill between the two renames leaves the old folder under its hidden name, which the next call removes.

    Raises:
        OSError: the folder cannot be written.
    """
    part, old = (path.with_name(f".{path.name}.{suffix}") for suffix in ("part", "old"))
    for left in (part, old):
        shutil.rmtree(left, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if file.is_file():
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            os.rename(path, old)
        os.rename(part, path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Replaces a file by one with this text, in UTF-8. If that fails, the file is as it was.

    What is no file, such as /dev/stdout or a pipe, is written to as it is.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def unwritable(error: BaseException) -> str | None:
    """Why results could not be written, if the error says so: a disk is full or read-only, or a quota is used up."""
    if isinstance(error, OSError) and error.errno in _NO_PLACE:
        return error.strerror
    if type(error).__name__ == "SafetensorError":  # has no number, only the operating system's words and "(os error 28)"
        return next((os.strerror(code) for code in _NO_PLACE if f"os error {code})" in str(error)), None)
    return None


def file_trouble(error: BaseException) -> str | None:
    """What an error says of files or connections, in one line; None if it is about something else."""
    if not isinstance(error, OSError):
        return unwritable(error)
    lines = str(error).splitlines() if error.strerror is None else [error.strerror]
    named = [] if error.filename is None else [os.fsdecode(error.filename) if not isinstance(error.filename, int) else "output"]
    return ": ".join([*named, *lines[:1]]) or type(error).__name__


def _link(part: Path, path: Path) -> bool:
    """Gives the file a second name, which no process has yet; False on a file system without links where the name is free."""
    try:
        os.link(part, path)
        return True
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(str(path)) from None
        return False
