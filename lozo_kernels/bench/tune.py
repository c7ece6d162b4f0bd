"""``lozo-kernels tune``: measures tile sizes of the Triton kernels on a GPU and keeps the fastest for that device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..kernels.backends.triton import TritonBackend
from ..kernels.backends.triton.tilesizes import TileSize, tile_sizes, user_file
from ..model.files import write_whole
from .clock import clock_for
from .document import progress
from .environment import environment
from .op_calls import OpCall, dense_calls, lowrank_calls, make_weights
from .timing import Contender, interleave, median

SHAPE = "8192x8192"
RANK_LIMITS = {"lowrank_update": (16, 64), "lowrank_momentum": (8, 64)}
"""Ranks that are measured; a size serves all ranks from the one below up to its own."""
LEAST_GAIN = 0.01
"""A size replaces the default if it is this much faster: less is noise."""
_PER_THREAD = (8, 64)  # elements of a block that a thread holds: fewer leave memory idle, more spill
_MAXNREG = (None, 128)  # a kernel of four warps with 128 registers has four programs on a multiprocessor
_TILE_COLS = 1024  # of a low-rank tile: enough to make U once for many columns, few enough for many tiles

Timer = Callable[[Mapping[str, Callable[[], None]]], dict[str, float]]
"""Median seconds of each of several calls."""


def candidates(kernel: str) -> list[TileSize]:
    """Lists the sizes that are worth measuring for a kernel."""
    found = []
    rows = (1,) if kernel.startswith("dense") else (32, 64, 128)
    for r in rows:
        for c in (1024, 2048, 4096) if r == 1 else (32, 64, 128):
            for warps in (4, 8):
                if _PER_THREAD[0] <= r * c // (32 * warps) <= _PER_THREAD[1]:
                    if r == 1:
                        found += [TileSize(r, c, blocks, warps) for blocks in (4, 16)]
                    else:
                        found += [
                            TileSize(r, c, _TILE_COLS // c, warps, ahead, maxnreg)
                            for ahead, maxnreg in itertools.product((False, True), _MAXNREG)
                        ]
    return found


def tune(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    shape: str = SHAPE,
    rounds: int = 10,
    seconds: float = math.inf,
    sizes_of: Callable[[str], Sequence[TileSize]] = candidates,
    timer: Timer | None = None,
) -> list[dict[str, Any]]:
    """Finds the best size for every kernel; returns entries of a tile-size file, with what was measured.

    Args:
        dtype: of the weights; sizes serve all dtypes.
        shape: of the matrix to measure on, "RxC".
        rounds: interleaved rounds.
        seconds: after these no further size is compiled and no further kernel measured; what is left out keeps its default.
        sizes_of: the candidates of a kernel; its default is always measured too.
        timer: instead of the device's clock, for tests.
    """
    timer = timer or _timer(device, rounds)
    end = time.monotonic() + seconds
    defaults = tile_sizes(None)
    entries = []
    for kernel, rank in _cases():
        if time.monotonic() > end:
            progress(f"{kernel} rank {rank}: no time was left")
            continue
        default = defaults.find(kernel, True, rank)
        calls = dict(_calls(kernel, rank, [default, *sizes_of(kernel)], device, dtype, shape, end))
        took = timer({name: call.run for name, (_, call) in calls.items()})
        best = min(took, key=lambda name: took[name])
        if took[best] > (1 - LEAST_GAIN) * took["default"]:
            best = "default"
        progress(f"{kernel} rank {rank}: {best}, {took['default'] / took[best]:.3f} x the default")
        entry = {"kernel": kernel, "weights": "aligned", "rank_up_to": rank} | dataclasses.asdict(calls[best][0])
        entries.append(entry | {"seconds": took[best], "default_seconds": took["default"], "measured": len(took)})
    return entries


def run(output: Path | None, seconds: float, command: str) -> int:
    """Tunes, and writes the file.

    Raises:
        InputError: there is no GPU that Triton serves.
    """
    if not torch.cuda.is_available():
        raise InputError("tuning measures a GPU, and there is none here; the default tile sizes need no tuning to be right")
    device = torch.device("cuda", torch.cuda.current_device())
    reason = TritonBackend().unavailable(device)
    if reason is not None:
        raise InputError(f"tuning is of the Triton kernels: {reason}")
    name = torch.cuda.get_device_name(device)
    path = output or user_file(name)
    document = {"device": name} | {"environment": environment(device, command.split())} | {"tiles": tune(device, seconds=seconds)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(document, indent=2) + "\n")
    print(f"tile sizes for {name} are in {path}")
    return 0


def _cases() -> Iterator[tuple[str, int]]:
    for kernel, ranks in RANK_LIMITS.items():
        for rank in ranks:
            yield kernel, rank
    yield "dense_update", 0


def _calls(
    kernel: str, rank: int, sizes: Sequence[TileSize], device: torch.device, dtype: torch.dtype, shape: str, end: float
) -> Iterator[tuple[str, tuple[TileSize, OpCall]]]:
    """Yields a call of the kernel for every size that compiles and runs, by name; the first is the default."""
    weights = make_weights(shape, dtype, device)
    for i, size in enumerate(sizes):
        if i and time.monotonic() > end:
            return
        backend = TritonBackend(sizes={kernel: size})
        if rank:
            call = lowrank_calls(weights.lowrank_table(rank, backend), backend)[kernel]
        else:
            call = dense_calls(weights.dense_table(), backend)["dense_update"]
        try:
            call.run()
        except Exception as e:  # too much shared memory, too many registers: Triton's errors have no common class
            if i == 0:
                raise
            progress(f"{kernel} rank {rank}: {size} cannot run ({type(e).__name__})")
            continue
        name = f"{size.rows}x{size.cols}x{size.blocks}, {size.num_warps} warps" + (", ahead" if size.ahead else "")
        name += "" if size.maxnreg is None else f", {size.maxnreg} registers"
        yield ("default" if i == 0 else name), (size, call)


def _timer(device: torch.device, rounds: int) -> Timer:
    clock = clock_for(device, cold=True)

    def measure(calls: Mapping[str, Callable[[], None]]) -> dict[str, float]:
        seconds = interleave({name: Contender(call) for name, call in calls.items()}, rounds, clock=clock)
        return {name: median(s.values()) for name, s in seconds.items()}

    return measure
