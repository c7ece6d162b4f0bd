"""A plan says with which constants and options a kernel is launched. Launches and compiling ahead of time share the plans.

Every kernel file makes the plans of its own kernels.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import triton.language as tl

from ...table import DTYPES
from .tilesizes import TileSize

WEIGHTS: dict[torch.dtype | None, Any] = {None: None, **dict(zip(DTYPES, (tl.float32, tl.bfloat16, tl.float16), strict=True))}
"""Triton's names of the dtypes of weights; None stands for any dtype."""
_LEAST_DOT = 16  # the least extent that tl.dot takes

ALL_REGISTERS = 255
"""The most registers of a thread on an NVIDIA GPU. By default ptxas spills some bytes of large kernels to keep more programs on
a multiprocessor."""
HALF_THE_REGISTERS = 128
SCALARS = ["scales", "decay", "coefficients", "alpha", "beta", "factors", "draws", "gain", "shift"]
"""Pointers of kernels to numbers that are read one at a time. A kernel is not compiled once more where they are not at a multiple
of 16 bytes, as those of one tensor or one direction among many are not."""
FACTOR_ROWS = 64  # rows per program where only a factor is touched


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
        """The launch options for Triton. Fusion is off: what is not written as a fused multiply-add is not made one."""
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": False}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


@dataclasses.dataclass(frozen=True)
class UpdateKind:
    """The properties of an update that its code depends on. The rank of dense tensors is 0; ``signs`` are dense noise in place of
    normal numbers."""

    draws: int
    decay: bool
    stochastic: bool
    momentum: bool
    rank: int = 0
    signs: bool = False


def target_of(device: torch.device) -> Target:
    """What the kernels on a device are compiled for."""
    hip, cpu = torch.version.hip is not None, device.type == "cpu"
    return Target(dp4a=not hip and not cpu, eights=hip, emulate=cpu, tf32=not hip)


def padded(rank: int) -> int:
    """The rank rounded up to an extent that tl.dot takes."""
    return max(_LEAST_DOT, 1 << (rank - 1).bit_length())


def factor_width(rank: int) -> int:
    """The rank rounded up to whole counters (four columns each), as a power of two."""
    return max(4, 1 << (rank - 1).bit_length())


def registers_of(size: TileSize, target: Target, otherwise: int | None = None) -> int | None:
    """The most registers of a thread: those of the tile size, or ``otherwise`` where it names none; a matter of NVIDIA GPUs."""
    return (size.maxnreg or otherwise) if target.dp4a else None


def as_int32(word: int) -> int:
    """An unsigned 32-bit word as the signed number that a kernel argument takes."""
    return word - (1 << 32) if word >= 1 << 31 else word
