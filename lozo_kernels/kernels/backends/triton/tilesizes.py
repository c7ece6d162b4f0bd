"""The tile sizes of the kernels, read from JSON: those that ``lozo-kernels tune`` measured on a device, or the defaults."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import Any

KERNELS = (
    *("lowrank_update", "dense_update", "dense_momentum"),
    *("lowrank_signed_update", "lowrank_merge", "dense_merge", "contraction", "expansion"),
)
_STOCHASTIC = "_stochastic"
"""The suffix for a kernel that rounds stochastically, which may need more registers. Without an entry, the kernel's own is used."""
ENVIRONMENT = "LOZO_KERNELS_TILES"


@dataclasses.dataclass(frozen=True)
class TileSize:
    """How a kernel divides its work.

    Attributes:
        rows, cols: extents of the block that a program holds in registers; powers of two. Rows of activations are tokens.
        blocks: how many blocks, side by side, a program works through; for activations the most.
        num_warps: warps of a program.
        ahead: the next block is read while one is worked on (low-rank kernels): more bytes in flight, more registers.
        maxnreg: the most registers of a thread on an NVIDIA GPU: fewer leave room for more programs. None: what the kernel's plan
            says.
    """

    rows: int
    cols: int
    blocks: int
    num_warps: int
    ahead: bool = False
    maxnreg: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "blocks", "num_warps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1 or value & (value - 1):
                raise ValueError(f"{name} of a tile is a power of two, not {value!r}")
        if self.maxnreg is not None and (not isinstance(self.maxnreg, int) or not 32 <= self.maxnreg <= 255):
            raise ValueError(f"maxnreg of a tile is from 32 to 255 registers, not {self.maxnreg!r}")


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """The tile sizes for one device, and the file they come from."""

    source: Path
    entries: tuple[tuple[str, str, int, TileSize], ...]

    def find(self, kernel: str, aligned: bool, rank: int, stochastic: bool = False) -> TileSize:
        """The size for a kernel of :data:`KERNELS`: that of the least ``rank_up_to`` that covers the rank (0 for dense ones)."""
        weights = "aligned" if aligned else "any"
        name = kernel + _STOCHASTIC if stochastic else kernel
        fitting = [(limit, size) for k, w, limit, size in self.entries if (k, w) == (name, weights) and limit >= rank]
        if not fitting and stochastic:
            return self.find(kernel, aligned, rank)
        if not fitting:
            raise ValueError(f"{self.source} has no tile size for {kernel}, {weights} weights, rank {rank}")
        return min(fitting, key=lambda entry: entry[0])[1]


def slug(device_name: str) -> str:
    """A device's name as part of a file name: "NVIDIA H200" becomes "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def user_file(device_name: str) -> Path:
    """The file that ``lozo-kernels tune`` writes the sizes of a device to by default."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lozo_kernels" / "tiles" / f"{slug(device_name)}.json"


@functools.cache
def tile_sizes(device_name: str | None, vendor: str = "nvidia") -> TileSizes:
    """Returns the sizes for a device, from the first file that exists: the user's, the package's for the device, the defaults.

    LOZO_KERNELS_TILES names a file that is used instead.

    Args:
        vendor: "nvidia" or "amd", whose defaults differ because a warp of AMD's has 64 threads.

    Raises:
        ValueError: a file does not hold tile sizes.
    """
    named = os.environ.get(ENVIRONMENT)
    packaged = Path(__file__).parent / "tiles"
    candidates = [packaged / f"default-{vendor}.json", packaged / "default.json"]
    if named:
        candidates = [Path(named)]
    elif device_name is not None:
        candidates = [user_file(device_name), packaged / f"{slug(device_name)}.json", *candidates]
    return read(next((path for path in candidates if path.exists()), candidates[-1]))


def read(path: Path) -> TileSizes:
    """Reads the tile sizes of a file; raises ValueError if it holds none. Kernels and ranks that it does not cover get the
    defaults."""
    default = Path(__file__).parent / "tiles" / "default.json"
    try:
        entries = [_entry(e) for e in json.loads(path.read_text(encoding="utf-8"))["tiles"]]
    except (OSError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise ValueError(f"{path} does not hold tile sizes ({type(e).__name__}: {e})") from None
    if path != default:
        covered: dict[tuple[str, str], int] = {}
        for kernel, weights, limit, _ in entries:
            covered[kernel, weights] = max(limit, covered.get((kernel, weights), limit))
        entries += [e for e in read(default).entries if e[2] > covered.get(e[:2], -1)]
    return TileSizes(path, tuple(entries))


def _entry(entry: dict[str, Any]) -> tuple[str, str, int, TileSize]:
    if entry["kernel"].removesuffix(_STOCHASTIC) not in KERNELS or entry["weights"] not in ("aligned", "any"):
        raise ValueError(f"unknown kernel or weights in {entry}")
    size = TileSize(
        entry["rows"], entry["cols"], entry["blocks"], entry["num_warps"], bool(entry.get("ahead", False)), entry.get("maxnreg")
    )
    return entry["kernel"], entry["weights"], int(entry["rank_up_to"]), size
