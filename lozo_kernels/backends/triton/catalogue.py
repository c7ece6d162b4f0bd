"""Every kernel with the constants and tile sizes that are launched by default, for compiling ahead of time (``bench/sass``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from ...noise import STREAMS
from ...table import DTYPES
from . import plans
from .plans import Plan, Target, UpdateKind
from .tilesizes import TileSize, tile_sizes

RANKS = (1, 2, 4, 8, 16, 32, 64)
_EXACT_MOMENTUM_RANK = 8
_POINTERS = {
    **dict.fromkeys(("tiles", "matrices", "header"), "*i32"),
    "tensors": "*i64",
    **dict.fromkeys(("scales", "decay", "coefficients", "alpha", "beta", "ratios", "out"), "*fp32"),
}
_NUMBERS = {"count": "i32", "tensor_id": "i32", "row_offset": "i32", "rows": "i32"}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A kernel as it is launched.

    Attributes:
        kernel: the op, with "_2" for two draws, "_stochastic", or "_any" for the variant of any dtype and alignment.
        function: the Triton function.
        signature: types of its runtime arguments; the others are constants.
        constants: its compile-time arguments.
        divisible: arguments that are divisible by 16 (addresses).
        options: launch options.
        dtype: of the weights, "any", or "none" where no weights are touched.
        rank: None for dense kernels.
        aligned: all access to weights must be 128 bits wide.
        exact: no fused multiply-add may occur.
        tile_elements: weights (or entries of a factor) that a program handles in a full tile.
        iterations: of its main loop for a full tile.
        itemsize: bytes of a weight, 0 where no weights are touched.
        bytes_per_element: that a pass must move at least: weights read and written, dense momentum too.
        default: a configuration that training uses by default, rather than a variant for special cases.
    """

    kernel: str
    function: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, Any]
    dtype: str
    rank: int | None
    aligned: bool
    exact: bool
    tile_elements: int
    iterations: int
    itemsize: int
    bytes_per_element: int
    default: bool


def compilations(vendor: str = "nvidia", ranks: Sequence[int] = RANKS) -> list[Compilation]:
    """Everything that is launched on GPUs of a vendor, "nvidia" or "amd"."""
    target = Target(dp4a=vendor == "nvidia", eights=vendor == "amd", emulate=False)
    return [*_lowrank(target, ranks), *_dense(target), *_factors(target, ranks)]


def _lowrank(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for rank in ranks:
        for dtype in (*DTYPES, None):
            for name, kind in _kinds(momentum=False, dtype=dtype):
                size = tile_sizes(None, _vendor(target)).find("lowrank_update", dtype is not None, rank, kind.stochastic)
                plan = plans.lowrank_plan(dtype, rank, kind, size, target)
                yield _update("lowrank_update" + name, plan, dtype, rank, size, exact=True)
            for name, kind in _kinds(momentum=True, dtype=dtype):
                size = tile_sizes(None, _vendor(target)).find("lowrank_momentum", dtype is not None, rank, kind.stochastic)
                plan = plans.lowrank_plan(dtype, rank, kind, size, target)
                yield _update("lowrank_momentum" + name, plan, dtype, rank, size, exact=rank <= _EXACT_MOMENTUM_RANK)


def _dense(target: Target) -> Iterator[Compilation]:
    for dtype in (*DTYPES, None):
        for op in ("dense_update", "dense_momentum"):
            for name, kind in _kinds(momentum=op == "dense_momentum", dtype=dtype):
                size = tile_sizes(None, _vendor(target)).find(op, dtype is not None, 0, kind.stochastic)
                yield _update(op + name, plans.dense_plan(dtype, kind, size, target), dtype, None, size, exact=True)


def _factors(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for rank in ranks:
        height, width = plans.FACTOR_ROWS, plans.factor_width(rank)
        for draws in (1, 2):
            name = "momentum_factor" if draws == 1 else "momentum_factor_2"
            yield _plain(name, plans.momentum_factor_plan(rank, draws, target), rank, height * width)
        for again in (False, True):
            name = "resample_reproject" if again else "resample"
            yield _plain(name, plans.resample_plan(rank, again, target), rank, plans.RESAMPLE_COLS * plans.padded(rank))
        yield _plain("reproject", plans.reproject_plan(rank), rank, height * width)
        yield _plain("factor_rows", plans.factor_plan(STREAMS["U"], rank, target), rank, height * width)


def _vendor(target: Target) -> str:
    return "nvidia" if target.dp4a else "amd"


def _kinds(momentum: bool, dtype: torch.dtype | None) -> Iterator[tuple[str, UpdateKind]]:
    """One draw, two draws, and stochastic rounding; the variant for any dtype with everything at once."""
    if dtype is None:
        yield "_any", UpdateKind(2, True, True, momentum)
        return
    yield "", UpdateKind(1, False, False, momentum)
    yield "_2", UpdateKind(2, True, False, momentum)
    if dtype != torch.float32:
        yield "_stochastic", UpdateKind(1, False, True, momentum)


def _update(kernel: str, plan: Plan, dtype: torch.dtype | None, rank: int | None, size: TileSize, *, exact: bool) -> Compilation:
    itemsize = 0 if dtype is None else dtype.itemsize
    name = "any" if dtype is None else str(dtype).removeprefix("torch.")
    moved = 2 * itemsize + (8 if kernel.startswith("dense_momentum") else 0)
    elements = size.rows * size.cols * size.blocks
    default = kernel in ("lowrank_update", "lowrank_momentum", "dense_update", "dense_momentum")
    return _compilation(
        kernel,
        plan,
        name,
        rank,
        dtype is not None,
        exact,
        elements,
        size.blocks,
        itemsize,
        bytes_per_element=moved,
        default=default,
    )


def _plain(kernel: str, plan: Plan, rank: int, elements: int) -> Compilation:
    exact = kernel != "resample_reproject"  # the division of its sums is in fp64, which fuses inside
    return _compilation(kernel, plan, "none", rank, False, exact, elements, 1, 0, bytes_per_element=0, default=False)


def _compilation(
    kernel: str,
    plan: Plan,
    dtype: str,
    rank: int | None,
    aligned: bool,
    exact: bool,
    elements: int,
    iterations: int,
    itemsize: int,
    *,
    bytes_per_element: int,
    default: bool,
) -> Compilation:
    signature = {name: (_POINTERS | _NUMBERS)[name] for name in plan.kernel.arg_names if name not in plan.constants}
    return Compilation(
        kernel=kernel,
        function=plan.kernel,
        signature=signature,
        constants=plan.constants,
        divisible=tuple(name for name in signature if name in _POINTERS),
        options=plan.options,
        dtype=dtype,
        rank=rank,
        aligned=aligned,
        exact=exact,
        tile_elements=elements,
        iterations=iterations,
        itemsize=itemsize,
        bytes_per_element=bytes_per_element,
        default=default,
    )
