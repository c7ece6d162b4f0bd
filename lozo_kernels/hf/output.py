"""The output of a command: its folder, its JSON, and why it could not be written."""

from __future__ import annotations

import json
import math
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


def read_object(file: Path, named: str = "") -> dict[str, Any]:
    """A JSON object from a file that may be anybody's.

    Args:
        named: what goes before the file's name in the message.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{named}{file} is not a JSON object: {e!s:.200}") from None
    if not isinstance(found, dict):
        raise InputError(f"{named}{file} is not a JSON object but a {type(found).__name__}")
    return found


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
