"""What goes wrong because of the input, and how a missing optional package is reported."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

import importlib
from types import ModuleType


class InputError(Exception):
    """Something that the user can put right. The message is the whole report: one line, without a traceback."""


def require(package: str, extra: str = "hf") -> ModuleType:
    """Imports an optional package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.split(".")[0] != package.split(".")[0]:
            raise
        raise InputError(f"this needs the package {package!r}: pip install 'lozo_kernels[{extra}]'") from None


class JournalError(RuntimeError):
    """A journal cannot be read, written, or used with this model; the message says why, and no weight was touched."""


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite too many steps in a row. The weights are those of the last good step."""


class PeerLostError(RuntimeError):
    """A rank died, hangs or cannot be reached. The step that was under way was not taken, on any rank."""


class DivergenceError(RuntimeError):
    """Ranks that have to be at the same point are not. Every rank raises it, and names the first step that is known to differ."""


class BatchSplitError(RuntimeError):
    """Evaluations that share a forward pass cannot be told apart in it."""
