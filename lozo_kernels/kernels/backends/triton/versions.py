"""The versions of Triton that the kernels are compiled and read with."""

from __future__ import annotations

import re

OLDEST_TRITON = (3, 6)


def unsupported(version: str) -> str | None:
    """Says why a Triton of this version is not used; None for one that is supported."""
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) >= OLDEST_TRITON:
        return None
    oldest = ".".join(map(str, OLDEST_TRITON))
    return f"Triton {version} is older than {oldest}, the oldest that is supported: pip install 'triton>={oldest}'"
