"""What simpler kernels would cost, in the same table. They are held to no budget, and counted on their shortest path.

Each reads and writes weights through weights.py, as the library's kernels do, so that its accesses are found.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl

from bench.sass.catalogue import Compilation
from lozo_kernels.kernels.backends.triton.noise import dense_any
from lozo_kernels.kernels.backends.triton.weights import as_fp32, read_weights, store_weights


@triton.jit
def dense_randn(x, scale, seed, count, BLOCK: tl.constexpr):
    """X += scale * Z with Triton's own generator: Box-Muller, with a logarithm, a sine or cosine, and a root per number."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    y = as_fp32(read_weights(x + at, mask), False)
    store_weights(x + at, y + tl.randn(seed, at) * scale, mask, False)


@triton.jit
def dense_scalar(x, scale, seed_low, seed_high, tensor_id, step, count, BLOCK: tl.constexpr, DP4A: tl.constexpr):
    """X += scale * Z with the library's noise, an element a thread: 16-bit access, and three of four words thrown away."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    y = as_fp32(read_weights(x + at, mask), False)
    step = step.to(tl.uint32) | (tl.full([], 2, tl.uint32) << 28)
    zero = tl.full([], 0, tl.uint32)
    key = (seed_low.to(tl.uint32), seed_high.to(tl.uint32))
    z = dense_any(at.to(tl.int64), zero, tensor_id.to(tl.uint32), step, key[0], key[1], False, DP4A)
    store_weights(x + at, y + z * scale, mask, False)


@triton.jit
def lowrank_loop(x, u, v, scale, rows, cols, stride, RANK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """X += scale * U V^T with U in memory, one multiply-add after the other; row-major V, as PyTorch's (cols, rank) has it."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    mask = (row[:, None] < rows) & (col[None, :] < cols)
    at = x + row.to(tl.int64)[:, None] * stride + col[None, :]
    y = as_fp32(read_weights(at, mask), False)
    product = tl.zeros([ROWS, COLS], dtype=tl.float32)
    for k in tl.static_range(RANK):
        left = tl.load(u + row * RANK + k, mask=row < rows, other=0.0).to(tl.float32)
        right = tl.load(v + col * RANK + k, mask=col < cols, other=0.0).to(tl.float32)
        product = tl.math.fma(left[:, None], right[None, :], product)
    store_weights(at, tl.math.fma(product, scale, y), mask, False)


@dataclasses.dataclass(frozen=True)
class Naive(Compilation):
    """A compilation that no budget is held against."""

    naive: bool = True


_TYPES = {"bfloat16": ("*bf16", 2), "float16": ("*fp16", 2), "float32": ("*fp32", 4)}
_LOOP_RANKS = (4, 16, 64)


def compilations(vendor: str = "nvidia") -> list[Compilation]:
    """The catalogue of naive kernels."""
    found: list[Compilation] = []
    for dtype, (pointer, itemsize) in _TYPES.items():
        common: dict[str, Any] = {"dtype": dtype, "itemsize": itemsize, "bytes_per_element": 2 * itemsize}
        scalars = {"scale": "fp32", "count": "i32"}
        keys = dict.fromkeys(("seed_low", "seed_high", "tensor_id", "step"), "i32")
        randn, dense = {"x": pointer, "seed": "i32", **scalars}, {"x": pointer, **keys, **scalars}
        constants = {"BLOCK": 128, "DP4A": vendor == "nvidia"}
        found += [
            _naive("naive_dense_randn", dense_randn, randn, {"BLOCK": 1024}, ("x", "count"), **common),
            _naive("naive_dense_scalar", dense_scalar, dense, constants, ("x", "count"), **common),
        ]
        matrix = {"x": pointer, "u": pointer, "v": pointer, "scale": "fp32", "rows": "i32", "cols": "i32", "stride": "i32"}
        aligned = ("x", "u", "v", "rows", "cols", "stride")
        for rank in _LOOP_RANKS:
            tile = {"RANK": rank, "ROWS": 32, "COLS": 64}
            found += [
                _naive("naive_lowrank_loop", lowrank_loop, matrix, tile, aligned, rank=rank, **common),
                # Without the promise that columns and row stride are multiples of 16, every access is of one element.
                _naive("naive_lowrank_narrow", lowrank_loop, matrix, tile, ("x", "u", "v"), rank=rank, **common),
            ]
    return found


def _naive(
    kernel: str,
    function: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...],
    *,
    dtype: str,
    itemsize: int,
    bytes_per_element: int,
    rank: int | None = None,
) -> Naive:
    elements = constants.get("BLOCK") or constants["ROWS"] * constants["COLS"]
    return Naive(
        kernel=kernel,
        function=function,
        signature=signature,
        constants=constants,
        divisible=divisible,
        options={"num_warps": 4, "num_stages": 1},
        dtype=dtype,
        rank=rank,
        aligned=True,
        exact=True,
        tile_elements=elements,
        iterations=1,
        itemsize=itemsize,
        bytes_per_element=bytes_per_element,
        default=False,
    )
