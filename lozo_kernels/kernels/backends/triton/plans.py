"""Which kernel with which constants does an op. Launches and compiling ahead of time share these plans."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton.language as tl

from ...table import DTYPES
from .dense import dense_update
from .lowrank import factor_update, lowrank_update
from .merge import REGISTER_RANK, dense_merge, lowrank_merge, probed_factor
from .resample import factor_rows, reproject, resample
from .skinny import contraction, expansion, lookup
from .tilesizes import TileSize

_WEIGHTS = dict(zip(DTYPES, (tl.float32, tl.bfloat16, tl.float16), strict=True))
_LEAST_DOT = 16  # the least extent that tl.dot takes

_ALL_REGISTERS = 255
"""The most registers of a thread on an NVIDIA GPU. By default ptxas spills some bytes of large kernels to keep more programs on
a multiprocessor."""
_HALF_THE_REGISTERS = 128
FACTOR_ROWS = 64  # rows per program where only a factor is touched
RESAMPLE_COLS = 64  # columns at a time: few enough that the fp32 sums of their products are exact


@dataclasses.dataclass(frozen=True)
class Target:
    """What the code is compiled for.

    Attributes:
        dp4a: NVIDIA's instruction for a sum of bytes is there.
        eights: blocks of 16-bit weights are stored in a shape whose last extent is 8, which keeps AMD's stores 128 bits wide.
        emulate: the kernel runs in the interpreter, whose conversions to bf16 are not those of a GPU.
        tf32: tensor cores keep 11 bits of an fp32 number; AMD's keep all.
    """

    dp4a: bool
    eights: bool
    emulate: bool
    tf32: bool = True


@dataclasses.dataclass(frozen=True)
class Plan:
    """A kernel, its compile-time constants and its launch options."""

    kernel: Any
    constants: dict[str, Any]
    num_warps: int = 4
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The launch options for Triton. Fusion is off, so that every multiply and add is rounded by itself."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@dataclasses.dataclass(frozen=True)
class UpdateKind:
    """The properties of an update that its code depends on."""

    draws: int
    decay: bool
    stochastic: bool
    momentum: bool


def padded(rank: int) -> int:
    """The rank rounded up to an extent that tl.dot takes."""
    return max(_LEAST_DOT, 1 << (rank - 1).bit_length())


def lowrank_plan(dtype: torch.dtype | None, rank: int, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of the pass over low-rank tensors; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": None if dtype is None else _WEIGHTS[dtype],
        "RANK": rank,
        "PADDED": padded(rank),
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "MOMENTUM": kind.momentum,
        "STOCHASTIC": kind.stochastic,
        "ROWS": size.rows,
        "COLS": size.cols,
        "BLOCKS": size.blocks,
        "AHEAD": size.ahead and dtype is not None,
        "EIGHTS": target.eights and dtype is not None and dtype.itemsize == 2,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    large = kind.momentum and (kind.stochastic or kind.draws == 2 or rank > 8)
    # N, two draws and the sums of each need more registers than four warps have.
    crowded = kind.momentum and kind.draws == 2 and rank > 32 and target.dp4a and dtype is not None
    num_warps = max(8, size.num_warps) if crowded else size.num_warps
    return Plan(lowrank_update, constants, num_warps, _ALL_REGISTERS if large and target.dp4a else None)


def factor_update_plan(rank: int, draws: int, decay: bool, momentum: bool, target: Target) -> Plan:
    """The plan that updates factors or, with ``momentum``, N before the pass over the weights."""
    constants = {
        "MOMENTUM": momentum,
        "RANK": rank,
        "PADDED": factor_width(rank),
        "DRAWS": draws,
        "DECAY": decay,
        "ROWS": FACTOR_ROWS,
        "DP4A": target.dp4a,
    }
    return Plan(factor_update, constants)


def is_wide(rank: int) -> bool:
    """Whether a merge keeps no columns of its factor in registers. Then :func:`probed_factor_plan` goes before one with a draw."""
    return rank > REGISTER_RANK.value


def probed_factor_plan(rank: int, target: Target) -> Plan:
    """The plan that writes N + scale * U to scratch memory before a merge of a high rank."""
    return Plan(probed_factor, {"RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS, "DP4A": target.dp4a})


def lowrank_merge_plan(dtype: torch.dtype | None, rank: int, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of a merge of low-rank tensors; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": None if dtype is None else _WEIGHTS[dtype],
        "RANK": rank,
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "STOCHASTIC": kind.stochastic,
        "ROWS": size.rows,
        "COLS": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    large = dtype == torch.float32 or kind.stochastic or rank > 4
    registers = _ALL_REGISTERS if large else _HALF_THE_REGISTERS
    return Plan(lowrank_merge, constants, size.num_warps, registers if target.dp4a else None)


def dense_merge_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of a merge of dense tensors, with N if ``kind.momentum``; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": None if dtype is None else _WEIGHTS[dtype],
        "FACTOR": kind.momentum,
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "STOCHASTIC": kind.stochastic,
        "COUNT": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(dense_merge, constants, size.num_warps, _HALF_THE_REGISTERS if target.dp4a and not kind.draws else None)


def plan_of(kernel: str, dtype: torch.dtype | None, rank: int, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of an op's pass over the weights; the rank of dense tensors is 0."""
    if kernel == "lowrank_merge":
        return lowrank_merge_plan(dtype, rank, kind, size, target)
    if kernel == "dense_merge":
        return dense_merge_plan(dtype, kind, size, target)
    return lowrank_plan(dtype, rank, kind, size, target) if rank else dense_plan(dtype, kind, size, target)


def contraction_plan(rank: int, factor: bool, size: TileSize, target: Target) -> Plan:
    """The plan of the product of activations with V or, with ``factor``, with B + scale * U."""
    constants = {
        "FACTOR": factor,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(contraction, constants, size.num_warps, _ALL_REGISTERS if target.dp4a else None)


def lookup_plan(rank: int, tokens: int, target: Target) -> Plan:
    """The plan that looks up rows of B + scale * U, ``tokens`` per program."""
    return Plan(lookup, {"RANK": rank, "PADDED": padded(rank), "TOKENS": tokens, "DP4A": target.dp4a})


def expansion_plan(
    dtype: torch.dtype, rank: int, factor: bool, parts: bool, gain: bool, shift: bool, size: TileSize, target: Target
) -> Plan:
    """The plan that multiplies sums of a contraction or look-up (in ``parts``, or one) by V, or by B + scale * U, and adds to Y."""
    constants = {
        "FACTOR": factor,
        "PARTS": parts,
        "GAIN": gain,
        "SHIFT": shift,
        "RANK": rank,
        "PADDED": padded(rank),
        "TOKENS": size.rows,
        "COLS": size.cols,
        "DP4A": target.dp4a,
        "EIGHTS": target.eights and dtype.itemsize == 2,
        "TF32": target.tf32,
        "EMULATE": target.emulate,
    }
    return Plan(expansion, constants, size.num_warps)


def dense_plan(dtype: torch.dtype | None, kind: UpdateKind, size: TileSize, target: Target) -> Plan:
    """The plan of the pass over dense tensors; ``dtype`` None means any dtype and alignment."""
    constants = {
        "WEIGHT": None if dtype is None else _WEIGHTS[dtype],
        "DRAWS": kind.draws,
        "DECAY": kind.decay,
        "MOMENTUM": kind.momentum,
        "STOCHASTIC": kind.stochastic,
        "COUNT": size.cols,
        "BLOCKS": size.blocks,
        "DP4A": target.dp4a,
        "EMULATE": target.emulate,
    }
    return Plan(dense_update, constants, size.num_warps)


def resample_plan(rank: int, with_momentum: bool, target: Target) -> Plan:
    """The plan that makes the V of a window and, with momentum, the ratios for :func:`reproject_plan`."""
    constants = {
        "RANK": rank,
        "PADDED": padded(rank),
        "REPROJECT": with_momentum,
        "COLS": RESAMPLE_COLS if padded(rank) <= 32 else RESAMPLE_COLS // 2,
        "DP4A": target.dp4a,
    }
    return Plan(resample, constants, num_warps=8 if padded(rank) > 32 else 4)  # four warps have too few registers for the fp64 sums


def reproject_plan(rank: int) -> Plan:
    """The plan that re-projects the momentum to the new V."""
    return Plan(reproject, {"RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS})


def factor_plan(stream: int, rank: int, target: Target) -> Plan:
    """The plan that makes one factor."""
    constants = {"STREAM": stream, "RANK": rank, "PADDED": factor_width(rank), "ROWS": FACTOR_ROWS, "DP4A": target.dp4a}
    return Plan(factor_rows, constants)


def factor_width(rank: int) -> int:
    """The rank rounded up to whole counters (four columns each), as a power of two."""
    return max(4, 1 << (rank - 1).bit_length())
