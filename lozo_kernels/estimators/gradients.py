"""Gradient estimators as functions of a plain loss: for tests, teaching and comparison, not for large models.

``loss`` takes the parameters as tensors by name and returns a 0-dim tensor or a number. Every estimate has their names and
shapes. The optimisers compute the same estimates with kernels, without ever holding one: LGE is :class:`~lozo_kernels.LOZO` with
``interval=1``, RGE is :class:`~lozo_kernels.MeZO`, and the lazy LGE of LOZO keeps V for ``interval`` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import jvp

Parameters = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


def projected_gradient(loss: Loss, at: Parameters, direction: Parameters, eps: float) -> float:
    """c = (F(X + eps D) - F(X - eps D)) / (2 eps): the central difference along a direction."""
    plus, minus = ({name: x + side * direction[name] for name, x in at.items()} for side in (eps, -eps))
    return (float(loss(plus)) - float(loss(minus))) / (2 * eps)


def rge(loss: Loss, at: Parameters, z: Parameters, eps: float) -> dict[str, Tensor]:
    """c Z: the randomised vector-wise estimator (MeZO; Chen et al., ICLR 2025, "RGE").

    Args:
        z: standard normal, of the parameters' shapes. Over Z the expectation of c Z is the gradient, up to O(eps^2).
    """
    c = projected_gradient(loss, at, z, eps)
    return {name: c * z[name] for name in at}


def lge(loss: Loss, at: Parameters, u: Parameters, v: Parameters, eps: float) -> dict[str, Tensor]:
    """c U V^T / r: the low-rank matrix-wise estimator (Chen et al., ICLR 2025, "LGE").

    Args:
        u, v: standard normal, (rows, r) and (cols, r) for each matrix. A vector has its own Z in ``u`` and nothing in ``v``.
    """
    direction = {name: u[name] @ v[name].T if name in v else u[name] for name in at}
    c = projected_gradient(loss, at, direction, eps)
    return {name: c * d / (v[name].shape[1] if name in v else 1) for name, d in direction.items()}


def subspace(loss: Loss, at: Parameters, u: Parameters, s: Parameters, v: Parameters, eps: float) -> dict[str, Tensor]:
    """c D with D = U S V^T sqrt(rows * cols) / r: the estimator of SubZero (Yu et al., 2024).

    Args:
        u, v: orthonormal columns, (rows, r) and (cols, r); s: (r, r) standard normal. A vector has its own Z in ``u`` only.
    """
    direction = {}
    for name, x in at.items():
        if name in v:
            direction[name] = u[name] @ s[name] @ v[name].T * (x.numel() ** 0.5 / s[name].shape[0])
        else:
            direction[name] = u[name]
    c = projected_gradient(loss, at, direction, eps)
    return {name: c * d for name, d in direction.items()}


def cge(loss: Loss, at: Parameters, eps: float) -> dict[str, Tensor]:
    """The coordinate-wise estimator: a central difference for every element, twice as many losses as there are elements."""
    estimate = {}
    for name, x in at.items():
        g = torch.empty(x.numel(), dtype=x.dtype)
        for i in range(x.numel()):
            unit = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            unit[i] = 1.0
            direction = {other: torch.zeros_like(y) for other, y in at.items()} | {name: unit.view(x.shape)}
            g[i] = projected_gradient(loss, at, direction, eps)
        estimate[name] = g.view(x.shape).to(x.device)
    return estimate


def forward_gradient(loss: Loss, at: Parameters, z: Parameters) -> dict[str, Tensor]:
    """(grad F . Z) Z by forward-mode differentiation: RGE without a finite difference (Baydin et al., 2022)."""
    c = jvp(loss, (dict(at),), (dict(z),))[1]
    return {name: c * z[name] for name in at}
