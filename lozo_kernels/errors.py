"""The exceptions that the library raises on purpose, and :func:`require`, which imports an optional package."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType


class InputError(Exception):
    """An error that the user can put right. The commands print its message, which is one line, without a traceback."""


class MissingPackageError(InputError, ImportError):
    """An optional package is not installed. The message says how to install it."""


def require(package: str) -> ModuleType:
    """Imports an optional package and returns it.

    Raises:
        MissingPackageError: the package is not installed, or one that it needs is not.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as e:
        if e.name is None or ("." in e.name and e.name.split(".")[0] != package.split(".")[0]):
            raise
        missing = package if e.name.split(".")[0] == package.split(".")[0] else e.name
        message = f"this needs the package {missing!r}: pip install '{_requirement(missing)}'"
        raise MissingPackageError(message, name=missing) from None


def _requirement(package: str) -> str:
    """What pip installs for a package, with the versions that this library asks for where its metadata has them."""
    name = {"PIL": "pillow"}.get(package.split(".")[0], package.split(".")[0])
    try:
        known = importlib.metadata.requires("lozo_kernels") or []
    except importlib.metadata.PackageNotFoundError:  # run from its sources
        known = []
    found = [r.split(";")[0].strip() for r in known]
    return next((r for r in found if re.split(r"[^\w-]", r)[0] == name), name)


class JournalError(RuntimeError):
    """A journal cannot be read, written, or used with this model; the message says why, and no weight was touched."""


class NonFiniteLossError(RuntimeError):
    """The loss was NaN or infinite too many steps in a row. The weights are those of the last good step."""


class PeerLostError(RuntimeError):
    """A rank died, hangs or cannot be reached. The step in progress was not taken on any rank."""


class DivergenceError(RuntimeError):
    """Ranks that have to be at the same point are not. Every rank raises it, and names the first step that is known to differ."""


class BatchSplitError(RuntimeError):
    """A model or a closure mixes the evaluations that share a forward pass, so that their losses cannot be told apart."""


class EngineError(RuntimeError):
    """A serving engine cannot be trained, or not as it is now; the message says what to do. Nothing was learned."""
