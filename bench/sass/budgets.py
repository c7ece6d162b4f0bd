"""The budgets, reviewed by hand: instructions per element that a kernel may take, and the roofline that it must be predicted to
reach.

Where they come from. A copy on an H200 moves about 4.3 TB/s, read and write together; its 132 multiprocessors issue 128 thread
instructions a clock at 1.755 GHz. In the time that an in-place pass needs for one element in memory, it therefore issues

    132 * 128 * 1.755e9 / 4.3e12 * 4 bytes = 28 instructions for bf16 and fp16, 55 for fp32,

and a kernel with more cannot be memory bound. Below that line a budget leaves room for what the count does not see (latency,
barriers, lower clocks). Numbers marked "required" are the project's goals on sm_90; all others were set just above what was
counted when the kernel was written, so that a change that makes it slower is noticed. They may be raised, by a person and with a
reason.

The first line that fits counts.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Budget:
    """A line of the table.

    Attributes:
        kernel, dtype, target: shell patterns.
        ranks: the least and the largest; dense kernels have none and fit every range.
        instructions: per element, of a full tile with its prologue.
    """

    kernel: str
    dtype: str
    ranks: tuple[int, int]
    target: str
    instructions: float


_ANY = (1, 64)
_SMALL, _MIDDLE, _LARGE = (1, 8), (9, 32), (33, 64)
_LEAST, _LOWER, _HALF, _UPPER = (1, 4), (5, 8), (9, 16), (17, 32)
_PADDED = (1, 16)
"""Ranks that matrix units take as 16."""

ROOFLINE = {"sm_90": 0.95}
"""The least predicted roofline of kernels in their default configuration; other targets' figures are nominal and promise
nothing."""


def _both(kernel: str, dtype: str, ranks: tuple[int, int], nvidia: float, amd: float) -> tuple[Budget, Budget]:
    return Budget(kernel, dtype, ranks, "sm_*", nvidia), Budget(kernel, dtype, ranks, "gfx*", amd)


IN_FLIGHT = {"sm_90": 0.95}
"""The least share of a copy's speed that reads in flight must allow at a latency of 1 us (latency.py), for kernels in their default
configuration that :data:`REASONS` does not name."""


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why kernels have less: shell patterns, the least and largest rank, and the reason in a few words."""

    kernel: str
    dtype: str
    ranks: tuple[int, int]
    text: str


REASONS = (
    Reason("dense_update_2", "*16", _ANY, "arithmetic: noise of two draws"),
    Reason("dense_*_stochastic", "*16", _ANY, "arithmetic: noise and random bits"),
    Reason("dense_*_2", "*16", _ANY, "arithmetic: noise of two draws"),
    Reason("lowrank_merge_stochastic", "*16", _ANY, "arithmetic, and registers: a product with N and random bits"),
    Reason("lowrank_merge*", "*", (9, 64), "registers for columns of N, and above rank 16 arithmetic in a fixed order"),
)


BUDGETS = (
    # required
    Budget("lowrank_update", "bfloat16", _SMALL, "sm_90", 16),
    Budget("lowrank_update", "bfloat16", _LARGE, "sm_90", 22),
    Budget("dense_update", "bfloat16", _ANY, "sm_90", 25),
    Budget("lowrank_merge", "bfloat16", _LEAST, "sm_90", 28),
    Budget("dense_update_2_signs", "bfloat16", _ANY, "sm_90", 28),
    # X and a product on tensor cores
    *_both("lowrank_update", "*16", _SMALL, 11, 18),
    *_both("lowrank_update", "*16", _MIDDLE, 12, 19),  # 11.03 with Triton 3.6
    *_both("lowrank_update", "*16", _LARGE, 13, 21),
    *_both("lowrank_update", "float32", _SMALL, 13, 13),
    *_both("lowrank_update", "float32", _MIDDLE, 14, 14),
    *_both("lowrank_update", "float32", _LARGE, 16, 16),
    *_both("lowrank_update_2", "*16", _SMALL, 14, 20),
    *_both("lowrank_update_2", "*16", _MIDDLE, 17, 22),
    *_both("lowrank_update_2", "*16", _LARGE, 20, 26),  # 19.5 with Triton 3.6
    *_both("lowrank_update_2", "float32", _SMALL, 16, 15),
    *_both("lowrank_update_2", "float32", _MIDDLE, 17, 17),
    *_both("lowrank_update_2", "float32", _LARGE, 21, 20),
    # with random bits, one counter of Philox for eight elements
    *_both("lowrank_update_stochastic", "*16", _ANY, 46, 66),
    # eight warps, whose matrix units take what lies in registers: two of them make each element
    # a fused multiply-add for each of 16 parts, and a sign of a column for every few rows of a thread
    *_both("lowrank_signed_update", "*", _ANY, 80, 60),
    *_both("lowrank_signed_update_stochastic", "*16", _ANY, 90, 82),
    *_both("lowrank_signed_update_any", "any", _ANY, 400, 700),
    # a normal number for every element: 22 instructions of noise on NVIDIA, which sums four bytes in one
    *_both("dense_update", "*16", _ANY, 29, 42),
    *_both("dense_update", "float32", _ANY, 36, 45),
    *_both("dense_update_2", "*", _ANY, 63, 75),
    *_both("dense_update_stochastic", "*16", _ANY, 56, 75),
    *_both("dense_momentum", "*", _ANY, 45, 50),
    *_both("dense_momentum_2", "*", _ANY, 75, 80),
    *_both("dense_momentum_stochastic", "*16", _ANY, 68, 80),
    # a sign for every element: one counter for the eight of a thread
    *_both("dense_update_signs", "*", _ANY, 15, 22),
    *_both("dense_update_2_signs", "*", _ANY, 27, 34),
    *_both("dense_momentum_signs", "*", _ANY, 23, 27),
    *_both("dense_momentum_2_signs", "*", _ANY, 36, 41),
    *_both("dense_merge_signs", "*", _ANY, 17, 23),
    *_both("dense_*_any_signs", "any", _ANY, 150, 330),
    # a product of fp32 numbers in a fixed order: a fused multiply-add for each rank
    *_both("lowrank_merge_any", "any", _ANY, 130, 330),
    *_both("lowrank_merge_stochastic", "*16", _SMALL, 60, 90),
    *_both("lowrank_merge_stochastic", "*16", _HALF, 75, 100),
    *_both("lowrank_merge_stochastic", "*16", _UPPER, 130, 160),
    *_both("lowrank_merge_stochastic", "*16", _LARGE, 220, 260),
    *_both("lowrank_merge*", "*", _LEAST, 16, 19),
    *_both("lowrank_merge*", "*", _LOWER, 28, 32),
    *_both("lowrank_merge*", "*", _HALF, 55, 62),
    *_both("lowrank_merge*", "*", _UPPER, 115, 130),
    *_both("lowrank_merge*", "*", _LARGE, 210, 240),
    # as dense_update, and N
    *_both("dense_merge_stochastic", "*16", _ANY, 56, 75),
    *_both("dense_merge_0", "*", _ANY, 12, 16),
    *_both("dense_merge", "*", _ANY, 30, 45),
    *_both("dense_merge_fresh", "*", _ANY, 30, 45),
    # per activation
    *_both("contraction", "*", _PADDED, 13, 12),
    *_both("contraction", "*", _ANY, 18, 18),
    *_both("contraction_factor", "*", _PADDED, 20, 18),
    *_both("contraction_factor", "*", _ANY, 54, 50),
    *_both("expansion", "*", _PADDED, 15, 17),
    *_both("expansion", "*", _ANY, 38, 22),
    *_both("expansion_factor", "*", _PADDED, 17, 18),
    *_both("expansion_factor", "*", _ANY, 40, 27),
    # all 16 parts of a row are loaded without a loop, most of them by no row; 29.1 on sm_80 with Triton 3.6
    *_both("expansion_all", "*16", _PADDED, 30, 46),
    Budget("expansion_all", "*16", _ANY, "sm_90", 54),
    *_both("expansion_all", "*16", _ANY, 62, 42),  # 61.5 on sm_120 and 57.4 on sm_100; less is asked there than on sm_90
    *_both("points_contraction", "*", _PADDED, 13, 10),  # 12.4 of fp32 on sm_100, 5.9 of bf16 on sm_90
    *_both("points_contraction", "*", _ANY, 14, 14),
    *_both("points_expansion", "*", _PADDED, 20, 24),  # 23.5 on gfx942 with Triton 3.6
    *_both("points_expansion", "*", _ANY, 29, 28),
    # a product with U too, most of it with zeros
    *_both("points_expansion_own", "*", _PADDED, 36, 39),
    *_both("points_expansion_own", "*", _ANY, 57, 54),  # 56.6 on sm_120 with Triton 3.6
    # any dtype and alignment: correct rather than fast
    *_both("lowrank_update_any", "any", _ANY, 80, 270),
    *_both("dense_*_any", "any", _ANY, 170, 345),
    # per entry of a factor, of which there are few; ranks below 4 pad to one counter
    *_both("factor_momentum", "none", _ANY, 155, 300),  # 294 with Triton 3.6
    *_both("factor_momentum_2", "none", _ANY, 225, 440),
    *_both("factor_update", "none", _ANY, 130, 260),
    *_both("factor_update_2", "none", _ANY, 200, 400),
    *_both("probed_factor", "none", _ANY, 45, 60),
    *_both("lookup", "none", _ANY, 60, 85),
    *_both("points_total*", "none", _ANY, 45, 80),
    *_both("resample", "none", _ANY, 60, 95),
    *_both("resample_reproject", "none", _ANY, 105, 170),
    *_both("reproject", "none", _ANY, 220, 300),
    *_both("factor_rows", "none", _ANY, 105, 220),
    # CUDA C++: the main loop only
    Budget("cuda_*", "any", _ANY, "*", 220),
    Budget("cuda_*", "none", _ANY, "*", 220),
    Budget("cuda_dense_update", "*", _ANY, "*", 36),
    Budget("cuda_dense_update_2", "*", _ANY, "*", 65),
    Budget("cuda_dense_update_signs", "*", _ANY, "*", 24),
    Budget("cuda_dense_update_2_signs", "*16", _ANY, "*", 30),
    Budget("cuda_dense_update_2_signs", "*", _ANY, "*", 40),
    Budget("cuda_dense_momentum_signs", "*", _ANY, "*", 31),
    Budget("cuda_dense_momentum_2_signs", "*", _ANY, "*", 49),
    Budget("cuda_dense_momentum", "*", _ANY, "*", 45),
    Budget("cuda_dense_momentum_2", "*", _ANY, "*", 75),
    Budget("cuda_lowrank_update", "*16", (1, 16), "*", 16),
    Budget("cuda_lowrank_update", "*16", _LARGE, "*", 22),
    Budget("cuda_lowrank_*", "*", _ANY, "*", 45),
)


def budget_for(job: Mapping[str, Any]) -> Budget | None:
    """Finds the budget of a kernel on a target."""
    return next((b for b in BUDGETS if _covers(b, job) and fnmatch.fnmatchcase(job["target"], b.target)), None)


def reason_for(job: Mapping[str, Any]) -> str | None:
    """Finds why a kernel has fewer reads in flight than a copy needs."""
    return next((r.text for r in REASONS if _covers(r, job)), None)


def _covers(line: Budget | Reason, job: Mapping[str, Any]) -> bool:
    names = all(fnmatch.fnmatchcase(job[key], getattr(line, key)) for key in ("kernel", "dtype"))
    return names and (job["rank"] is None or line.ranks[0] <= job["rank"] <= line.ranks[1])
