"""The journal of a run: its start, its seed and one scalar for each direction and step, from which its weights follow exactly."""

from __future__ import annotations

from ..errors import JournalError
from .compare import Difference, diff
from .format import Detour, End, Flushed, Guides, Header, Record, Settled, Sides, StepTaken
from .reader import RecordedRun, read_journal
from .replaying import Replayed, Verification, replay, revert, verify
from .writer import Journal

__all__ = [
    "Detour",
    "Difference",
    "End",
    "Flushed",
    "Guides",
    "Header",
    "Journal",
    "JournalError",
    "Record",
    "RecordedRun",
    "Replayed",
    "Settled",
    "Sides",
    "StepTaken",
    "Verification",
    "diff",
    "read_journal",
    "replay",
    "revert",
    "verify",
]
