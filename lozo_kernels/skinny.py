"""Products of activations with the factors of a weight: what a probe adds to the outputs of a layer whose weight is only read.

Between two draws of V the weight of LOZO is W + B V^T (Chen et al., ICLR 2025, Section 4.1), so a probed layer computes
X W^T + (X V)(B + scale U)^T. Sums of activations are not promised in bits: they are bounded, as the layer's own are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .noise import MAX_RANK
from .registry import Backend, Skinny, choose_backend
from .table import DTYPES


def lowrank_linear_(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    seed: int,
    tensor_id: int,
    draws: Tensor,
    scales: Tensor,
    row_offset: int = 0,
    transposed: bool = False,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Y <- gain * Y + (X V)(B + scale U)^T + shift, for a layer that computes X W^T with W (rows, cols).

    Args:
        y: (tokens, rows), fp32, bf16 or fp16, unit column stride; changed in place.
        x: (tokens, cols), its dtype may be another.
        v: (rank, cols) fp16, contiguous: V transposed.
        b: (rows, rank) fp32, contiguous.
        seed, tensor_id, row_offset: place of U in the noise.
        draws: (groups, 2) int64 on the device of y: step and direction. The tokens are ``groups`` equal blocks, in order.
        scales: (groups,) fp32.
        transposed: the layer computes X W: y is (tokens, cols), x (tokens, rows), and X (B + scale U) V^T is added.
        gain: (1,) fp32, or None for 1.
        shift: (groups, columns of y) fp32, or None for 0.
        backend: default: the best for the device.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    rows, cols = len(b), v.shape[-1]
    inputs, outputs = (rows, cols) if transposed else (cols, rows)
    _check(y, v, b, draws, scales, outputs)
    if x.dim() != 2 or x.shape[1] != inputs or len(x) != len(y) or x.dtype not in DTYPES or (inputs > 1 and x.stride(1) != 1):
        raise ValueError(
            f"x is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; needed is ({len(y)}, {inputs}), rows contiguous"
        )
    if shift is not None and (shift.shape != (len(draws), outputs) or shift.dtype != torch.float32 or not shift.is_contiguous()):
        raise ValueError(f"shift is {tuple(shift.shape)} {shift.dtype}; needed is contiguous fp32 ({len(draws)}, {outputs})")
    if torch.compiler.is_compiling():
        torch.ops.lozo_kernels.lowrank_linear_(
            y, x, v, b, _signed(seed), tensor_id, row_offset, draws, scales, transposed, gain, shift, _name(backend)
        )
        return
    backend = choose_backend(y.device).backend if backend is None else backend
    backend.lowrank_linear_(Skinny(y, x, v, b, seed, tensor_id, row_offset, draws, scales, transposed, gain, shift))


def lowrank_embedding_(
    y: Tensor,
    rows: Tensor,
    v: Tensor,
    b: Tensor,
    *,
    seed: int,
    tensor_id: int,
    draws: Tensor,
    scales: Tensor,
    row_offset: int = 0,
    gain: Tensor | None = None,
    backend: Backend | None = None,
) -> None:
    """Y <- gain * Y + ((B + scale U) V^T)[rows]: only the rows of U that are looked up are generated.

    Args:
        y: (tokens, cols); rows: (tokens,) int64 or int32, contiguous, which the embedding itself has checked.
        v, b, seed, tensor_id, draws, scales, row_offset, gain, backend: as in :func:`lowrank_linear_`.

    Raises:
        TypeError, ValueError: an argument is of the wrong dtype or shape.
    """
    _check(y, v, b, draws, scales, v.shape[-1])
    if rows.shape != (len(y),) or rows.dtype not in (torch.int64, torch.int32) or not rows.is_contiguous():
        raise ValueError(f"rows is {tuple(rows.shape)} {rows.dtype}; needed is contiguous int64 or int32 ({len(y)},)")
    if torch.compiler.is_compiling():
        torch.ops.lozo_kernels.lowrank_embedding_(
            y, rows, v, b, _signed(seed), tensor_id, row_offset, draws, scales, gain, _name(backend)
        )
        return
    backend = choose_backend(y.device).backend if backend is None else backend
    backend.lowrank_embedding_(Skinny(y, rows, v, b, seed, tensor_id, row_offset, draws, scales, gain=gain))


def _check(y: Tensor, v: Tensor, b: Tensor, draws: Tensor, scales: Tensor, outputs: int) -> None:
    if y.dtype not in DTYPES:
        raise TypeError(f"y is {y.dtype}; supported are {', '.join(str(d) for d in DTYPES)}")
    if y.dim() != 2 or y.shape[1] != outputs or (outputs > 1 and y.stride(1) != 1):
        raise ValueError(f"y is {tuple(y.shape)} with strides {y.stride()}; needed is (tokens, {outputs}), rows contiguous")
    if v.dim() != 2 or v.dtype != torch.float16 or not v.is_contiguous():
        raise ValueError(f"v is {tuple(v.shape)} {v.dtype}; needed is contiguous fp16 (rank, cols)")
    if b.shape != (len(b), len(v)) or b.dtype != torch.float32 or not b.is_contiguous() or not 1 <= len(v) <= MAX_RANK:
        raise ValueError(f"b is {tuple(b.shape)} {b.dtype}; needed is contiguous fp32 (rows, {len(v)}), rank 1 to {MAX_RANK}")
    groups = len(draws)
    if draws.shape != (groups, 2) or draws.dtype != torch.int64 or not draws.is_contiguous():
        raise ValueError(f"draws is {tuple(draws.shape)} {draws.dtype}; needed is contiguous int64 (groups, 2)")
    if scales.shape != (groups,) or scales.dtype != torch.float32 or not scales.is_contiguous():
        raise ValueError(f"scales is {tuple(scales.shape)} {scales.dtype}; needed is contiguous fp32 ({groups},)")
    if groups == 0 or len(y) % groups:
        raise ValueError(f"{len(y)} tokens do not divide into {groups} evaluations")


def _signed(seed: int) -> int:
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _name(backend: Backend | None) -> str:
    return "" if backend is None else backend.name
