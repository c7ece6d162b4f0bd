"""The Triton that kernels are compiled with: the installed one, or one in a folder of its own."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import sys
from pathlib import Path

from lozo_kernels.errors import InputError
from lozo_kernels.kernels.backends.triton.versions import OLDEST_TRITON

from .cache import ROOT

ENVIRONMENT = "LOZO_KERNELS_OLDEST_TRITON"
OLDEST = "oldest"
"""Stands for the oldest supported Triton, in the folder that LOZO_KERNELS_OLDEST_TRITON names or ``make setup`` fills."""


@dataclasses.dataclass(frozen=True)
class Toolchain:
    """One Triton.

    Attributes:
        version: its version.
        folder: where it is alone; None for the installed one.
    """

    version: str
    folder: Path | None = None

    def import_path(self) -> str:
        """Returns the PYTHONPATH of a process that imports this Triton, and from anywhere what this process can."""
        own = [] if self.folder is None else [str(self.folder)]
        return os.pathsep.join([str(ROOT), *own, *(p for p in sys.path if p)])


def installed() -> Toolchain | None:
    """Returns the installed Triton, or None."""
    version = _version(sys.path)
    return None if version is None else Toolchain(version)


def oldest_folder() -> Path:
    """Returns the folder of the oldest supported Triton, which may be missing."""
    return Path(os.environ.get(ENVIRONMENT) or Path(sys.prefix) / "triton-oldest")


def in_folder(name: str) -> Toolchain:
    """Returns the Triton in a folder, or in that of :data:`OLDEST`.

    Raises:
        InputError: there is none, or the folder of the oldest has another version.
    """
    folder = (oldest_folder() if name == OLDEST else Path(name)).resolve()
    wanted = ".".join(map(str, OLDEST_TRITON)) + ".0"
    command = f"pip install --target {folder} --no-deps triton=={wanted}"
    version = _version([str(folder)])
    if version is None:
        raise InputError(f"there is no Triton in {folder}: {command}")
    if name == OLDEST and version != wanted:
        raise InputError(f"{folder} has Triton {version}, and the oldest that is supported is {wanted}: {command}")
    return Toolchain(version, folder)


def _version(path: list[str]) -> str | None:
    found = next(iter(importlib.metadata.distributions(name="triton", path=path)), None)
    return None if found is None else found.version
