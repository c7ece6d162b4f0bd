"""The time that a measurement may take, counted from the start of its process: importing torch and making a context are in it."""

from __future__ import annotations

import os
import time
from pathlib import Path

_IMPORTED = time.monotonic()

EXIT_INCOMPLETE = 3
"""Exit status of a measurement whose time was over before it had measured everything."""


def process_seconds() -> float:
    """Returns the seconds since this process started, or since this module was imported where the system does not tell."""
    imported = time.monotonic() - _IMPORTED
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return imported
    return max(imported, uptime - ticks / os.sysconf("SC_CLK_TCK"))


class Deadline:
    """The end of a measurement.

    Args:
        seconds: from the start of the process; None for none.
    """

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.passed = False

    def over(self) -> bool:
        """Whether nothing more is to be begun. A measurement that was told so once is incomplete (:attr:`passed`)."""
        if self.seconds is not None and process_seconds() > self.seconds:
            self.passed = True
        return self.passed

    def note(self) -> dict[str, bool]:
        """Returns what a document says of a measurement that is incomplete; nothing for one that is not."""
        return {"complete": False} if self.passed else {}
