"""Every kernel with the constants and tile sizes that are launched by default, for compiling ahead of time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from lozo_kernels.kernels.backends.triton import (
    activations,
    dense,
    dense_merge,
    lowrank,
    lowrank_merge,
    lowrank_signed,
    points,
    resample,
)
from lozo_kernels.kernels.backends.triton.plans import FACTOR_ROWS, Plan, Target, UpdateKind, factor_width, padded
from lozo_kernels.kernels.backends.triton.tilesizes import TileSize, tile_sizes
from lozo_kernels.kernels.noise import STREAMS
from lozo_kernels.kernels.table import DTYPES

RANKS = (1, 2, 4, 8, 16, 32, 64)
_MEMORY_BOUND_RANK = 8  # merges of higher ranks wait for arithmetic
_PARTS = 16
"""The parts of a batch that a signed update is counted with."""
_POINTERS = {
    **dict.fromkeys(("tiles", "matrices", "header"), "*i32"),
    **dict.fromkeys(("tensors", "outputs", "draws", "ids", "starts", "bases", "directions"), "*i64"),
    **dict.fromkeys(("scales", "decay", "coefficients", "alpha", "beta", "ratios", "out"), "*fp32"),
    **dict.fromkeys(("b", "sums", "gain", "shift", "factors", "signs", "f", "u", "p"), "*fp32"),
    "v": "*fp16",
}
_NUMBERS = dict.fromkeys(
    (
        *("count", "tensor_id", "row_offset", "rows", "seed_low", "seed_high", "size", "groups", "parts", "blocks", "height"),
        *("inner", "outer", "stride", "quads", "length", "ranks", "width", "first", "own", "rank"),
    ),
    "i32",
)
_EXTENTS = ("inner", "outer", "stride")  # of activations; those of a model are divisible by 16
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclasses.dataclass(frozen=True)
class Compilation:
    """A kernel as it is launched.

    Attributes:
        kernel: the op, with "_2" for two draws, "_stochastic", "_any" for the variant of any dtype and alignment, and "_signs".
        function: the Triton function.
        signature: types of its runtime arguments; the others are constants.
        constants: its compile-time arguments.
        divisible: arguments that are divisible by 16 (addresses).
        options: launch options.
        dtype: of the weights, "any", or "none" where no weights are touched.
        rank: None for dense kernels.
        aligned: all access to weights must be 128 bits wide.
        exact: no fused multiply-add may occur.
        fused: those that an element has instead, in products that the contract writes with them; None where none are promised.
        tile_elements: weights (or entries of a factor) that a program handles in a full tile.
        iterations: of its main loop for a full tile.
        itemsize: bytes of a weight, 0 where no weights are touched.
        bytes_per_element: that a pass must move at least: weights read and written, dense momentum too.
        default: a configuration that training uses by default, rather than a variant for special cases.
        writes: weights are written too, not only read.
        nested: trips of a loop inside the main one.
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
    writes: bool = True
    nested: int | None = None
    fused: int | None = None

    @property
    def read_bytes(self) -> int:
        """The bytes an element that a pass reads: of weights, and of what is as large as they are."""
        momentum = 4 if self.kernel.startswith("dense_momentum") else 0
        return self.bytes_per_element - momentum - (self.itemsize if self.writes else 0)


def compilations(vendor: str = "nvidia", ranks: Sequence[int] = RANKS) -> list[Compilation]:
    """Lists everything that is launched on GPUs of a vendor, "nvidia" or "amd"."""
    nvidia = vendor == "nvidia"
    target = Target(dp4a=nvidia, eights=not nvidia, emulate=False, tf32=nvidia)
    return [
        *_lowrank(target, ranks),
        *_signed(target, ranks),
        *_dense(target),
        *_factors(target, ranks),
        *_merges(target, ranks),
        *_activations(target, ranks),
        *_points(target, ranks),
    ]


def _lowrank(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for rank in ranks:
        for dtype in (*DTYPES, None):
            for name, kind in _kinds(False, dtype, rank):
                size = tile_sizes(None, _vendor(target)).find("lowrank_update", dtype is not None, rank, kind.stochastic)
                plan = lowrank.lowrank_plan(dtype, kind, size, target)
                yield _update("lowrank_update" + name, plan, dtype, rank, size)


def _signed(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for rank, dtype in itertools.product(ranks, (*DTYPES, None)):
        kinds = {"": UpdateKind(1, False, False, False, rank), "_stochastic": UpdateKind(1, False, True, False, rank)}
        if dtype is None:
            kinds = {"_any": UpdateKind(1, True, True, False, rank)}
        for name, kind in kinds.items():
            if kind.stochastic and dtype == torch.float32:
                continue
            size = tile_sizes(None, _vendor(target)).find("lowrank_signed_update", dtype is not None, rank, kind.stochastic)
            plan = lowrank_signed.lowrank_signed_plan(dtype, kind, size, target)
            # Every part adds an exact product.
            yield _update("lowrank_signed_update" + name, plan, dtype, rank, size, fused=_PARTS)


def _dense(target: Target) -> Iterator[Compilation]:
    for dtype in (*DTYPES, None):
        for op in ("dense_update", "dense_momentum"):
            for name, kind in _kinds(op == "dense_momentum", dtype):
                size = tile_sizes(None, _vendor(target)).find(op, dtype is not None, 0, kind.stochastic)
                yield _update(op + name, dense.dense_plan(dtype, kind, size, target), dtype, None, size)


def _factors(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for rank in ranks:
        height, width = FACTOR_ROWS, factor_width(rank)
        for op in ("factor_momentum", "factor_update"):
            for draws in (1, 2):
                plan = lowrank.factor_update_plan(rank, draws, draws == 2, op == "factor_momentum", target)
                yield _plain(op if draws == 1 else f"{op}_2", plan, rank, height * width)
        for again in (False, True):
            name = "resample_reproject" if again else "resample"
            yield _plain(name, resample.resample_plan(rank, again, target), rank, resample.RESAMPLE_COLS * padded(rank))
        yield _plain("reproject", resample.reproject_plan(rank, target), rank, height * width)
        yield _plain("factor_rows", resample.factor_plan(STREAMS["U"], rank, target), rank, height * width)
        if lowrank_merge.is_wide(rank):
            yield _plain("probed_factor", lowrank_merge.probed_factor_plan(rank, target), rank, height * width)
        yield _plain("lookup", activations.lookup_plan(rank, height, target), rank, height * padded(rank))


def _merges(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for dtype in (*DTYPES, None):
        for name, kind in _merge_kinds(dtype):
            size = tile_sizes(None, _vendor(target)).find("dense_merge", dtype is not None, 0, kind.stochastic)
            plan = dense_merge.dense_merge_plan(dtype, kind, size, target)
            yield _update("dense_merge" + name, plan, dtype, None, size)
            for rank in ranks if kind.momentum and not kind.signs else ():
                kind = dataclasses.replace(kind, rank=rank)
                size = tile_sizes(None, _vendor(target)).find("lowrank_merge", dtype is not None, rank, kind.stochastic)
                plan = lowrank_merge.lowrank_merge_plan(dtype, kind, size, target)
                yield _update("lowrank_merge" + name, plan, dtype, rank, size, fused=_fused_of_merge(rank))


def _activations(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    for dtype, rank, factor in itertools.product(DTYPES, ranks, (False, True)):
        name = "_factor" if factor else ""
        size = tile_sizes(None, _vendor(target)).find("contraction", True, rank)
        yield _activation("contraction" + name, activations.contraction_plan(rank, factor, size, target), dtype, rank, size)
        size = tile_sizes(None, _vendor(target)).find("expansion", True, rank)
        plan = activations.expansion_plan(dtype, rank, factor, 1, False, False, size, target)
        yield _activation("expansion" + name, plan, dtype, rank, size)
        if factor and dtype != torch.float32:
            plan = activations.expansion_plan(dtype, rank, factor, 16, True, True, size, target)
            yield _activation("expansion_all", plan, dtype, rank, size)


def _points(target: Target, ranks: Sequence[int]) -> Iterator[Compilation]:
    """Lists the ranks that one program handles at once; more are the same code, run several times."""
    low = [rank for rank in ranks if rank <= points.RANKS]
    for rank, (name, summed) in itertools.product(low, (("", False), ("_own", True))):
        plan = points.points_total_plan(rank, summed)
        yield _plain("points_total" + name, plan, rank, FACTOR_ROWS * plan.constants["PADDED"])
    for dtype, rank in itertools.product(DTYPES, low):
        size = tile_sizes(None, _vendor(target)).find("contraction", True, rank)
        yield _activation("points_contraction", points.points_contraction_plan(rank, size, target), dtype, rank, size)
        size = tile_sizes(None, _vendor(target)).find("expansion", True, rank)
        for name, along in (("", False), ("_own", True)):
            plan = points.points_expansion_plan(dtype, rank, along, True, size, target)
            yield _activation("points_expansion" + name, plan, dtype, rank, size)


def _vendor(target: Target) -> str:
    return "nvidia" if target.dp4a else "amd"


def _kinds(momentum: bool, dtype: torch.dtype | None, rank: int = 0) -> Iterator[tuple[str, UpdateKind]]:
    """Yields one draw, two draws and stochastic rounding; for the variant for any dtype, everything at once. Of dense noise, with
    signs in place of normal numbers too."""
    if dtype is None:
        yield "_any", UpdateKind(2, True, True, momentum, rank)
        if not rank:
            yield "_any_signs", UpdateKind(2, True, True, momentum, signs=True)
        return
    yield "", UpdateKind(1, False, False, momentum, rank)
    yield "_2", UpdateKind(2, True, False, momentum, rank)
    if not rank:
        yield "_signs", UpdateKind(1, False, False, momentum, signs=True)
        yield "_2_signs", UpdateKind(2, True, False, momentum, signs=True)
    if dtype != torch.float32:
        yield "_stochastic", UpdateKind(1, False, True, momentum, rank)


def _merge_kinds(dtype: torch.dtype | None) -> Iterator[tuple[str, UpdateKind]]:
    """Yields a probed weight, a merged one, one without N, and stochastic rounding; everything at once for any dtype."""
    if dtype is None:
        yield "_any", UpdateKind(1, True, True, True)
        return
    yield "", UpdateKind(1, False, False, True)
    yield "_0", UpdateKind(0, True, False, True)
    yield "_fresh", UpdateKind(1, False, False, False)
    yield "_signs", UpdateKind(1, False, False, True, signs=True)
    if dtype != torch.float32:
        yield "_stochastic", UpdateKind(1, False, True, True)


def _fused_of_merge(rank: int) -> int:
    """Counts the fused multiply-adds of an element: the first product of N V^T is rounded, and above the ranks that stay in
    registers fused with -0."""
    return rank if lowrank_merge.is_wide(rank) else rank - 1


def _update(
    kernel: str, plan: Plan, dtype: torch.dtype | None, rank: int | None, size: TileSize, *, fused: int | None = 0
) -> Compilation:
    itemsize = 0 if dtype is None else dtype.itemsize
    name = "any" if dtype is None else str(dtype).removeprefix("torch.")
    moved = 2 * itemsize + (8 if kernel.startswith("dense_momentum") else 4 if plan.constants.get("FACTOR") else 0)
    elements = size.rows * size.cols * size.blocks
    low = kernel in ("lowrank_merge", "lowrank_merge_0") and (rank or 0) <= _MEMORY_BOUND_RANK
    default = low or kernel in ("lowrank_update", "dense_update", "dense_momentum", "dense_merge")
    return _compilation(
        kernel,
        plan,
        name,
        rank,
        dtype is not None,
        fused == 0,
        elements,
        size.blocks,
        itemsize,
        bytes_per_element=moved,
        default=default,
        fused=fused or None,
        nested=_nested(kernel, rank),
    )


def _nested(kernel: str, rank: int | None) -> int | None:
    if kernel.startswith("lowrank_signed"):
        return _PARTS
    return rank // 4 if kernel.startswith("lowrank_merge") and rank else None


def _activation(kernel: str, plan: Plan, dtype: torch.dtype, rank: int, size: TileSize) -> Compilation:
    """Describes a kernel on activations that allow 128-bit access. Its sums are bounded, not exact."""
    writes = "expansion" in kernel
    return _compilation(
        kernel,
        plan,
        str(dtype).removeprefix("torch."),
        rank,
        True,
        False,
        size.rows * size.cols * size.blocks,
        size.blocks,
        dtype.itemsize,
        bytes_per_element=dtype.itemsize * (2 if writes else 1),
        default=False,
        writes=writes,
        nested=1,  # a second part of a long row
        types=_POINTERS | {"x": _TYPES[dtype], "y": _TYPES[dtype]},
    )


def _plain(kernel: str, plan: Plan, rank: int, elements: int) -> Compilation:
    # The one divides its sums in fp64, which fuses inside; the other is written with fused multiply-adds.
    exact = kernel not in ("resample_reproject", "reproject")
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
    writes: bool = True,
    nested: int | None = None,
    fused: int | None = None,
    types: Mapping[str, str] = _POINTERS,
) -> Compilation:
    signature = {name: {**types, **_NUMBERS}[name] for name in plan.kernel.arg_names if name not in plan.constants}
    unaligned = {p.name for p in plan.kernel.params if p.do_not_specialize_on_alignment}
    return Compilation(
        kernel=kernel,
        function=plan.kernel,
        signature=signature,
        constants=plan.constants,
        divisible=tuple(name for name in signature if (name in types and name not in unaligned) or name in _EXTENTS),
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
        writes=writes,
        nested=nested,
        fused=fused,
    )
