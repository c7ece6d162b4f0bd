"""What tokens at several points add to the outputs of a layer: one product with V for all, one with the factors of their points."""

from __future__ import annotations

import torch
from torch import Tensor


def add_points(
    y: Tensor,
    x: Tensor,
    v: Tensor,
    b: Tensor,
    u: Tensor | None,
    directions: Tensor,
    scales: Tensor,
    *,
    gain: Tensor | None = None,
    transposed: bool = False,
) -> None:
    """Y[t] <- gain * Y[t] + (X[t] V) B^T + scale[t] * (X[t] V_r) U[direction[t]]^T, where V_r is the first r columns of V.

    Args:
        y: (tokens, rows), any dtype of weights; changed in place.
        x: (tokens, cols).
        v: (ranks, cols) fp32, V transposed; b: (rows, ranks) fp32.
        u: (directions, rows, r) fp32 with r <= ranks, or None without points.
        directions, scales: (tokens,) int64 and fp32.
        gain: (1,) fp32, or None for 1.
        transposed: the layer computes X W: y is (tokens, cols), x (tokens, rows), and X (B + scale U) V^T is added.
    """
    wide = x.float()
    if transposed:
        inner = wide @ b
        if u is not None:
            count, rows, rank = u.shape
            along = (wide @ u.transpose(0, 1).reshape(rows, count * rank)).view(-1, count, rank)
            inner[:, :rank] += scales[:, None] * along[torch.arange(len(wide), device=x.device), directions]
        added = inner @ v
    else:
        product = wide @ v.T
        added = product @ b.T
        if u is not None:
            count, rows, rank = u.shape
            spread = torch.zeros(len(wide), count, rank, dtype=torch.float32, device=x.device)
            spread[torch.arange(len(wide), device=x.device), directions] = scales[:, None] * product[:, :rank]
            added += spread.view(len(wide), count * rank) @ u.transpose(1, 2).reshape(count * rank, rows)
    if gain is not None:
        y *= gain.to(y.dtype)
    y += added.to(y.dtype)
