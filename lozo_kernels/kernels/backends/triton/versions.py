"""The versions of Triton that the kernels are compiled and read with."""

from __future__ import annotations

import re

OLDEST_TRITON = (3, 6)
_KEEPS_PAIRS = (3, 9)


def unsupported(version: str) -> str | None:
    """Says why a Triton of this version is not used; None for one that is supported."""
    if _numbers(version) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"Triton {version} is older than {oldest}, the oldest that is supported: pip install 'triton>={oldest}'"


def fuses_pairs(version: str) -> bool:
    """Whether the assembler of this Triton may fuse a product and a sum of two numbers at a time (see arithmetic.py)."""
    return _numbers(version) < _KEEPS_PAIRS


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version; one that has none counts as the newest."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (1 << 30,)
