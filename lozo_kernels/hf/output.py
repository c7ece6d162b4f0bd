"""The output of a command: its folder, its JSON, and why it could not be written."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import InputError


def make_folder(output: Path) -> Path:
    """Makes the folder that ``--output`` names, where there is none.

    Raises:
        InputError: it cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise InputError(f"--output {output}: {e.strerror}") from None
    return output


_NO_PLACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def unwritable(error: BaseException) -> str | None:
    """Why results could not be written, if the error says so: a disk is full or read-only, or a quota is used up."""
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
