"""``lozo-kernels tune``: measures tile sizes of the Triton kernels on a GPU and keeps the fastest for that device."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import sys
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
from .deadline import process_seconds
from .document import progress
from .environment import environment
from .gate import GateError, check, check_small
from .op_calls import OpCall, dense_calls, lowrank_calls, make_weights
from .timing import Contender, interleave, median

SHAPE = "8192x8192"
RANK_LIMITS = {"lowrank_update": (16, 64), "lowrank_merge": (8, 64)}
"""Ranks that are measured; a size serves all ranks from the one below up to its own."""
_CALLS = {"lowrank_merge": "lowrank_momentum"}
"""The call that a kernel is measured in, where it is not of the kernel's own name."""
LEAST_GAIN = 0.01
"""A size replaces the default if it is this much faster: less is noise."""
_PER_THREAD = (8, 64)  # elements of a block that a thread holds: fewer leave memory idle, more spill
_FEW_REGISTERS = 128  # with which a multiprocessor holds four programs of four warps
_MANY = 16  # elements of a thread from which on a kernel may have more registers than that
_TILE_COLS = 1024  # of a low-rank tile: enough to make U once for many columns, few enough for many tiles

Timer = Callable[[Mapping[str, Callable[[], None]]], dict[str, float]]
"""Median seconds of each of several calls."""


def candidates(kernel: str) -> list[TileSize]:
    """Lists the sizes that are worth measuring for a kernel."""
    found = []
    rows = (1,) if kernel.startswith("dense") else (32, 64, 128)
    for r, c, warps in itertools.product(rows, (1024, 2048, 4096) if rows == (1,) else (32, 64, 128), (4, 8)):
        per_thread = r * c // (32 * warps)
        if not _PER_THREAD[0] <= per_thread <= _PER_THREAD[1]:
            continue
        if r == 1:
            found += [TileSize(r, c, blocks, warps) for blocks in (4, 16)]
            continue
        limits = (None, _FEW_REGISTERS) if per_thread >= _MANY else (None,)
        aheads = (False, True) if kernel == "lowrank_update" else (False,)
        found += [TileSize(r, c, _TILE_COLS // c, warps, ahead, limit) for ahead in aheads for limit in limits]
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
    after_each: Callable[[list[dict[str, Any]]], object] = lambda _: None,
) -> list[dict[str, Any]]:
    """Finds the best size for every kernel; returns entries of a tile-size file, with what was measured.

    Raises:
        GateError: the default size gives wrong bits.

    Args:
        dtype: of the weights; sizes serve all dtypes.
        shape: of the matrix to measure on, "RxC".
        rounds: interleaved rounds.
        seconds: after these no further size is compiled and no further kernel measured; what is left out keeps its default.
        sizes_of: the candidates of a kernel; its default is always measured too.
        timer: instead of the device's clock, for tests.
        after_each: called with the entries so far.
    """
    timer = timer or _timer(device, rounds)
    end = time.monotonic() + seconds
    defaults = tile_sizes(None)
    entries = []
    for kernel, rank in cases():
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
        after_each(entries)
    return entries


def run(output: Path | None, seconds: float, command: str) -> int:
    """Tunes, and writes the file after every kernel. Returns 0, or 1 if a default size gives wrong bits.

    Args:
        seconds: counted from the start of the process.

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
    document = {"device": name, "environment": environment(device, command.split())}
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(entries: list[dict[str, Any]]) -> None:
        write_whole(path, json.dumps(document | {"tiles": entries}, indent=2) + "\n")

    try:
        save(tune(device, seconds=seconds - process_seconds(), after_each=save))
    except GateError as e:
        print(f"lozo-kernels tune: error: a kernel is wrong, so nothing is tuned: {e}", file=sys.stderr)
        return 1
    print(f"tile sizes for {name} are in {path}")
    return 0


def cases() -> Iterator[tuple[str, int]]:
    """Yields what is measured: kernel and rank."""
    for kernel, ranks in RANK_LIMITS.items():
        for rank in ranks:
            yield kernel, rank
    yield "dense_update", 0


def _calls(
    kernel: str, rank: int, sizes: Sequence[TileSize], device: torch.device, dtype: torch.dtype, shape: str, end: float
) -> Iterator[tuple[str, tuple[TileSize, OpCall]]]:
    """Yields a call of the kernel for every size that compiles and gives the right bits, by name; the first is the default."""
    weights, row = make_weights(shape, dtype, device), _CALLS.get(kernel, kernel)
    for i, size in enumerate(sizes):
        if i and time.monotonic() > end:
            return
        backend = TritonBackend(sizes={kernel: size})
        if rank:
            call = lowrank_calls(weights.lowrank_table(rank, backend), backend)[row]
        else:
            call = dense_calls(weights.dense_table(), backend)[row]
        try:
            check_small(row, dtype, call)
            check(row, shape, call)
        except GateError as e:
            if i == 0:
                raise
            progress(f"{kernel} rank {rank}: {size} is not kept, because it is wrong: {e}")
            continue
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
