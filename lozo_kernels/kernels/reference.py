"""Every op on one tensor, in plain PyTorch: the truth that tests, benchmarks and the eager backend share.

Each function is pure: it returns the new value and leaves its arguments alone. ``dtype`` is the arithmetic: ``torch.float32``
reproduces the promised bits (each operation is rounded, in the order written here; :func:`fma` is one operation);
``torch.float64`` is the truth for error bounds. Rounding into the weight's own dtype is a separate last step
(:func:`round_nearest`, :func:`round_stochastic`).

A weight is seen as a batch of matrices (batch, rows, cols): a matrix has batch 1, a stack of experts has a matrix for each, a
convolution is (1, out, rest), a dense tensor is (1, 1, numel). V is stored transposed, (batch, rank, cols), in fp16, which
holds its values exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


def _start(x: Tensor, decay: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = x.to(dtype)
    return y if decay is None else y * decay.to(dtype)


def low_rank_product(u: Tensor, v: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """U V^T, computed exactly: factors are multiples of 2**-8, so fp64 holds every partial sum.

    Args:
        u: (batch, rows, rank); v: (batch, rank, cols).

    Returns:
        (batch, rows, cols) of ``dtype``.
    """
    # A sum of zero can be -0.0, depending on the BLAS; adding 0.0 makes it +0.0, as a sum of integers is.
    return (u.double() @ v.double() + 0.0).to(dtype)


def lowrank_update(
    x: Tensor,
    v: Tensor,
    us: Sequence[Tensor],
    scales: Sequence[Tensor],
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * X + scale_0 * U_0 V^T + scale_1 * U_1 V^T (LOZO, Algorithm 1: perturbation and update are this with other scales).

    Args:
        x: (batch, rows, cols); v: (batch, rank, cols); us: one (batch, rows, rank) per draw.
        scales: one 0-dim tensor per draw; decay: 0-dim tensor or None for 1.
    """
    y = _start(x, decay, dtype)
    for u, scale in zip(us, scales, strict=True):
        y = y + low_rank_product(u, v, dtype) * scale.to(dtype)
    return y


def lowrank_signed_update(
    x: Tensor,
    v: Tensor,
    rows: Tensor,
    cols: Tensor,
    us: Sequence[Tensor],
    scales: Sequence[Tensor],
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * X + (U V^T) o Q with Q = sum over parts of scale_i * r_i s_i^T (GRZO, arXiv 2606.02857).

    Q is summed with i ascending. Its products are exact, because r_i and s_i are signs.

    Args:
        x: (batch, rows, cols); v: (batch, rank, cols); us: one (batch, rows, rank).
        rows, cols: r_i, (parts, batch, rows), and s_i, (parts, batch, cols): 1 and -1.
        scales: one 0-dim tensor per part.
    """
    q = torch.full((), -0.0, dtype=dtype, device=x.device)  # which leaves every first term as it is, zeros too
    for r, s, scale in zip(rows.to(dtype), cols.to(dtype), scales, strict=True):
        q = q + (r * scale.to(dtype)).unsqueeze(-1) * s.unsqueeze(-2)
    return _start(x, decay, dtype) + low_rank_product(us[0], v, dtype) * q


def dense_update(
    x: Tensor,
    zs: Sequence[Tensor],
    scales: Sequence[Tensor],
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * X + scale_0 * Z_0 + scale_1 * Z_1 (MeZO; one-dimensional tensors under LOZO). Each Z has the shape of ``x``."""
    y = _start(x, decay, dtype)
    for z, scale in zip(zs, scales, strict=True):
        y = y + z.to(dtype) * scale.to(dtype)
    return y


def momentum(
    n: Tensor, directions: Sequence[Tensor], coefficients: Sequence[Tensor], beta: Tensor, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """beta * N + coefficient_0 * D_0 + coefficient_1 * D_1, D being U (LOZO-M, Algorithm 2, line 12) or Z (MeZO-M)."""
    n = n.to(dtype) * beta.to(dtype)
    for d, c in zip(directions, coefficients, strict=True):
        n = n + d.to(dtype) * c.to(dtype)
    return n


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c rounded once: the fused multiply-add of IEEE 754, which processors have as one instruction, in bits.

    Args:
        a, b, c: fp32, of shapes that broadcast; in fp64, which is for bounds only, each operation is rounded by itself.
    """
    if c.dtype != torch.float32:
        return a * b + c
    # fp64 holds a product of two fp32 exactly, but rounds the sum. Rounded to odd instead (to the neighbour whose last bit is 1,
    # unless the sum is exact), it rounds to the fp32 nearest to the exact sum, because fp64 has more than two bits more.
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # exact (Knuth's TwoSum); NaN where the sum is not finite
    towards = torch.where((error > 0) == (total > 0), 1, -1)  # the exact sum's other neighbour, in steps of the last bit
    bits = total.view(torch.int64)
    even = (bits & 1) == 0
    inexact = (error.abs() > 0) & even  # no comparison with NaN holds
    return torch.where(inexact, bits + towards, bits).view(torch.float64).to(torch.float32)


def momentum_product(n: Tensor, v: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """N V^T with k ascending from 0: the first product is rounded, and every other is added by :func:`fma`.

    Args:
        n: (batch, rows, rank) fp32; v: (batch, rank, cols).

    Returns:
        (batch, rows, cols) of ``dtype``.
    """
    n, v = n.to(dtype), v.to(dtype)
    acc = n[..., :, 0:1] * v[..., 0:1, :]
    for k in range(1, v.shape[-2]):
        acc = fma(n[..., :, k : k + 1], v[..., k : k + 1, :], acc)
    return acc


def apply_momentum(y: Tensor, product: Tensor, alpha: Tensor) -> Tensor:
    """Y + alpha * M, M being the dense momentum: the last term of an update of MeZO-M, alpha being -lr."""
    return y + product.to(y.dtype) * alpha.to(y.dtype)


@dataclasses.dataclass(frozen=True)
class MomentumTerms:
    """The scalars of a momentum update, 0-dim tensors: a coefficient for each draw, alpha (-lr / r, or -lr if dense), and beta."""

    coefficients: Sequence[Tensor]
    alpha: Tensor
    beta: Tensor


def lowrank_momentum(
    x: Tensor,
    v: Tensor,
    n: Tensor,
    us: Sequence[Tensor],
    scales: Sequence[Tensor],
    terms: MomentumTerms,
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns X and N after a step of LOZO-M: :func:`lowrank_merge` of a factor of zeros after :func:`factor_momentum`."""
    f, n = factor_momentum(torch.zeros_like(n), n, us, scales, terms, dtype=dtype)
    return lowrank_merge(x, v, f, decay=decay, dtype=dtype), n


def dense_momentum(
    x: Tensor,
    n: Tensor,
    zs: Sequence[Tensor],
    scales: Sequence[Tensor],
    terms: MomentumTerms,
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns X and M after a step of MeZO-M: M by :func:`momentum`, X by :func:`dense_update` with alpha * M added last."""
    n = momentum(n, zs, terms.coefficients, terms.beta, dtype=dtype)
    return apply_momentum(dense_update(x, zs, scales, decay, dtype=dtype), n, terms.alpha), n


def factor_update(
    f: Tensor,
    us: Sequence[Tensor],
    scales: Sequence[Tensor],
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * F + scale_0 * U_0 + scale_1 * U_1: LOZO's update of the factor B of a window, or of the momentum N.

    Args:
        f: (batch, rows, rank) fp32; us: one (batch, rows, rank) per draw.
    """
    return dense_update(f, us, scales, decay, dtype=dtype)


def factor_momentum(
    f: Tensor,
    n: Tensor,
    us: Sequence[Tensor],
    scales: Sequence[Tensor],
    terms: MomentumTerms,
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Returns F and N after a step of LOZO-M on factors: as :func:`dense_momentum`, with U in place of Z."""
    return dense_momentum(f, n, us, scales, terms, decay, dtype=dtype)


def lowrank_merge(
    x: Tensor,
    v: Tensor,
    f: Tensor,
    us: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * X + (F + scale * U) V^T by :func:`momentum_product`: a probe's weight or, without draws, the merged weight.

    Args:
        x: (batch, rows, cols); v: (batch, rank, cols); f: (batch, rows, rank) fp32; us: (batch, rows, rank) each.
    """
    return _start(x, decay, dtype) + momentum_product(factor_update(f, us, scales, dtype=dtype), v, dtype=dtype)


def dense_merge(
    x: Tensor,
    f: Tensor | None,
    zs: Sequence[Tensor] = (),
    scales: Sequence[Tensor] = (),
    decay: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """decay * X + (F + scale * Z). F, fp32 of X's shape or None for 0, is the sum of the dense updates since the last merge."""
    y = _start(x, decay, dtype)
    if f is not None:
        return y + dense_update(f, zs, scales, dtype=dtype)
    return dense_update(y, zs, scales, dtype=dtype)


def lowrank_linear(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    f: Tensor,
    *,
    transposed: bool = False,
    gain: Tensor | None = None,
    shift: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """gain * Y + X (F V^T)^T + shift: the outputs of a linear layer with weight W + F V^T, from its outputs Y with weight W.

    Args:
        y: (tokens, rows), or (tokens, cols) if transposed; x: (tokens, cols), or (tokens, rows).
        v: (rank, cols) fp16; f: (rows, rank) fp32, U included.
        transposed: the layer computes X W instead of X W^T.
        gain: 0-dim; shift: one value per column of y.
    """
    v, f = v.to(dtype), f.to(dtype)
    inner, outer = (f, v.T) if transposed else (v.T, f)
    y = _start(y, gain, dtype) + (x.to(dtype) @ inner) @ outer.T
    return y if shift is None else y + shift.to(dtype)


def lowrank_embedding(
    y: Tensor, rows: Tensor, v: Tensor, f: Tensor, *, gain: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """gain * Y + (F V^T)[rows]: the outputs of an embedding with weight W + F V^T, from its outputs Y with weight W.

    Args:
        y: (tokens, cols); rows: (tokens,) integers; v: (rank, cols) fp16; f: (rows of the weight, rank) fp32, U included.
    """
    return _start(y, gain, dtype) + f.to(dtype)[rows] @ v.to(dtype)


def lowrank_points(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    b: Tensor,
    u: Tensor | None,
    directions: Tensor,
    scales: Tensor,
    *,
    transposed: bool = False,
    gain: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """gain * Y + X (B V^T)^T + the same with scale * U of each token's direction and the first r columns of V in place of B and V.

    Args:
        y: (tokens, rows), or (tokens, cols) if transposed; x: (tokens, cols), or (tokens, rows).
        v: (ranks, cols) fp32, V transposed; b: (ranks, rows) fp32, B transposed.
        u: (count, r, rows) fp32, U of each direction transposed, r <= ranks; None adds no U.
        directions: (tokens,) integers below count; scales: (tokens,) fp32.
        transposed: the layer computes X W instead of X W^T.
        gain: 0-dim or (1,).
    """
    wide, v, b = x.to(dtype), v.to(dtype), b.to(dtype)
    p, added = wide @ (b if transposed else v).T, None
    if u is not None:
        # One product for all directions, with zeros where a token has another one, so that no U is copied for each token.
        count, rank, rows = u.shape
        rest, factors = scales.to(dtype)[:, None], u.to(dtype).reshape(count * rank, rows)
        tokens = torch.arange(len(x), dtype=torch.int64, device=x.device)
        if transposed:
            p[:, :rank] += rest * (wide @ factors.T).view(-1, count, rank)[tokens, directions]
        else:
            spread = p.new_zeros(len(x), count, rank)
            spread[tokens, directions] = rest * p[:, :rank]
            added = spread.view(len(x), count * rank) @ factors
    product = p @ (v if transposed else b)
    return _start(y, gain, dtype) + (product if added is None else product.add_(added))


def reproject(n: Tensor, v_old: Tensor, v_new: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """N (V_old^T V_new) / cols: the momentum expressed in the new V, through an r x r product (LOZO-M, Algorithm 2, line 6).

    The r x r sums are integers below 2**53 (exact in fp64 in any order), divided in fp64 and rounded once; then k ascends from 0.

    Args:
        n: (batch, rows, rank) fp32; v_old, v_new: (batch, rank, cols).
    """
    # Divide by a tensor: a division by a number may become a multiplication by its reciprocal, which rounds differently.
    cols = torch.full((), max(1, v_old.shape[-1]), dtype=torch.float64, device=v_old.device)
    gram = (v_old.double() @ v_new.double().transpose(-1, -2) / cols).to(dtype)
    return momentum_product(n, gram, dtype=dtype)


def round_nearest(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to nearest even, as ``Tensor.to`` does."""
    return y.to(dtype)


def round_stochastic(y: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 to bf16 or fp16 so that the mean over ``bits`` is ``y``: adds random bits below the last kept one and truncates.

    Magnitudes that fp16 holds only as subnormals are rounded on their fixed grid of 2**-24. Values that are not finite are
    converted unchanged, and fp32 is not rounded.

    Args:
        y: fp32; bits: int32 of the same shape, uniform in [0, 2**16) (:func:`noise.rounding_bits`).
    """
    if dtype == torch.float32:
        return y
    raw = y.view(torch.int32)
    if dtype == torch.bfloat16:
        rounded = ((raw + bits) & -0x10000).view(torch.float32)
    elif dtype == torch.float16:
        normal = ((raw + (bits >> 3)) & -0x2000).view(torch.float32)
        steps = ((y.abs() * 2.0**40).clamp(max=2.0**30).to(torch.int32) + bits) >> 16
        rounded = torch.where(y.abs() < 2.0**-14, torch.copysign(steps.to(torch.float32) * 2.0**-24, y), normal)
    else:
        raise TypeError(f"stochastic rounding is into bfloat16 or float16, not {dtype}")
    return torch.where(torch.isfinite(y), rounded, y).to(dtype)
