"""Where and how a measurement was made, which is a part of every result."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..kernels.backends import native
from ..kernels.registry import choose_backend
from ..kernels.version import __version__

PROGRAM = ("lozo-kernels", "bench")
PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "safetensors", "datasets")

_PACKAGE = Path(__file__).resolve().parents[1]


def environment(device: torch.device, argv: Sequence[str], *, program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """Describes device, CPU, threads, instruction set, backend, versions, commit, command line and date.

    Args:
        argv: arguments of the program that measures.
        program: the words that start it.
    """
    backend = choose_backend(device).backend
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "last_level_cache_bytes": last_level_cache(),
        "threads": torch.get_num_threads(),
        "isa": native.isa() if backend.name == "native" else None,
        "backend": backend.name,
        "versions": versions(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "command": shlex.join([*program, *map(portable, argv)]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str | None]:
    """Returns the versions of this package and of those that it can use; None for one that is not installed."""
    return {"lozo_kernels": __version__, "python": platform.python_version()} | {name: _installed(name) for name in PACKAGES}


class OtherLoad:
    """Measures how many CPUs other processes use from the moment that this is made."""

    def __init__(self) -> None:
        self._start = self._read()

    def mean(self) -> float | None:
        """Returns their number on average, or None where the system does not tell."""
        if self._start is None:
            return None
        now = self._read()
        assert now is not None
        busy, own, clock = (b - a for a, b in zip(self._start, now, strict=True))
        return round(max(0.0, busy - own) / clock, 2) if clock else None

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        """Reads the CPU seconds of the machine, those of this process and its children, and the time."""
        try:
            fields = [int(n) for n in Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]]
        except OSError:
            return None
        own = os.times()
        idle = fields[3] + fields[4]
        # Guest time (the last two) is counted under user time too.
        busy = (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
        return busy, sum(own[:4]), time.monotonic()


def cpu_name() -> str:
    """Returns the model name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Returns the bytes of the largest cache of the first CPU, or None where the system does not say."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text(encoding="utf-8").strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M"):
            sizes.append(int(text[:-1]) << 20)
    return max(sizes, default=None)


def commit() -> str | None:
    """Returns the commit that the package was run from, with "+changes" if its sources differ, or None outside its repository."""
    root = _PACKAGE.parent
    try:
        _git(root, "ls-files", "--error-unmatch", f"{_PACKAGE.name}/__init__.py")
        changes = _git(root, "status", "--porcelain", "--", _PACKAGE.name, "csrc", "setup.py")
        return _git(root, "rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True).stdout.strip()


def portable(word: str) -> str:
    """Returns a word of a command line, of which an absolute path, which means nothing on another machine, keeps its last name."""
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else word


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
