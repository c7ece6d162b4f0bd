"""What goes wrong because of the input, and how a missing optional package is reported."""

from __future__ import annotations

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
