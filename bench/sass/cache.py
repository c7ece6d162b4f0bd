"""Keeps what was read from machine code in files named by a hash of everything that it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lozo_kernels" / "sass"

_READERS = ("program", "nvidia", "amd", "flow", "facts")


class Cache:
    """Answers, by the fingerprint of what they were made from and a key that is unique for that fingerprint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, fingerprint: str, key: str) -> Any:
        """Returns an answer, or None where there is none."""
        try:
            return json.loads(self._path(fingerprint, key).read_text())
        except (OSError, ValueError):
            return None

    def put(self, fingerprint: str, key: str, answer: Any) -> None:
        """Keeps an answer."""
        path = self._path(fingerprint, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
        partial.write_text(json.dumps(answer))
        partial.replace(path)

    def _path(self, fingerprint: str, key: str) -> Path:
        return self._folder / (hashlib.sha256(f"{fingerprint} {key}".encode()).hexdigest() + ".json")


def fingerprint(compiler: str, driver: Path, sources: Iterable[Path]) -> str:
    """Hashes a compiler's version, the file that runs it, the sources, and the code that reads what comes out."""
    digest = hashlib.sha256(compiler.encode())
    for file in (driver, *sources, *(Path(__file__).parent / f"{name}.py" for name in _READERS)):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
