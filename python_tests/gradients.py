"""Gradient estimators as functions of a plain loss: for tests, teaching and comparison, not for large models.

``loss`` takes the parameters as tensors by name and returns a 0-dim tensor or a number. Every estimate has their names and
shapes. The optimisers compute the same estimates with kernels, without ever holding one: LGE is :class:`~lozo_kernels.LOZO` with
``interval=1``, RGE is :class:`~lozo_kernels.MeZO`, and the lazy LGE of LOZO keeps V for ``interval`` steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from lozo_kernels.model.losses import as_loss

Parameters = Mapping[str, Tensor]
Loss = Callable[[dict[str, Tensor]], Tensor]


def projected_gradient(loss: Loss, at: Parameters, direction: Parameters, eps: float) -> float:
    """c = (F(X + eps D) - F(X - eps D)) / (2 eps): the central difference along a direction.

    Raises:
        TypeError, ValueError: an argument has a wrong type or shape, or ``loss`` returns no number. All estimators raise these.
    """
    _check_eps(eps)
    _check_like(at, direction, "the direction")
    plus, minus = ({name: x + side * direction[name] for name, x in at.items()} for side in (eps, -eps))
    return (float(as_loss(loss(plus))) - float(as_loss(loss(minus)))) / (2 * eps)


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
    _check_factors(at, u, v)
    direction = {name: u[name] @ v[name].T if name in v else u[name] for name in at}
    c = projected_gradient(loss, at, direction, eps)
    return {name: c * d / (v[name].shape[1] if name in v else 1) for name, d in direction.items()}


def subspace(loss: Loss, at: Parameters, u: Parameters, s: Parameters, v: Parameters, eps: float) -> dict[str, Tensor]:
    """c D with D = U S V^T sqrt(rows * cols) / r: the estimator of SubZero (Yu et al., 2024).

    Args:
        u, v: orthonormal columns, (rows, r) and (cols, r); s: (r, r) standard normal. A vector has its own Z in ``u`` only.
    """
    _check_factors(at, u, v, s)
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
    _check_eps(eps)
    _check_tensors("the parameters", at)
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
    _check_like(at, z, "z")

    def checked(parameters: dict[str, Tensor]) -> Tensor:
        value = loss(parameters)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            raise TypeError(f"the loss is a tensor of one real number here, not {value!r:.200}")
        return value.reshape(())

    c = jvp(checked, (dict(at),), ({name: z[name] for name in at},))[1]
    return {name: c * z[name] for name in at}


def _check_eps(eps: Any) -> None:
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"eps is a number, not {eps!r:.200}")
    if not 0 < eps < math.inf:  # type: ignore[operator]
        raise ValueError(f"eps is a finite number above 0, not {eps}")


def _check_tensors(what: str, tensors: Any) -> None:
    good = isinstance(tensors, Mapping) and all(isinstance(x, Tensor) and x.is_floating_point() for x in tensors.values())
    if not good:
        raise TypeError(f"{what} are tensors of real numbers by name, not {tensors!r:.200}")


def _check_like(at: Any, direction: Any, what: str) -> None:
    _check_tensors("the parameters", at)
    _check_tensors(f"the parts of {what}", direction)
    for name, x in at.items():
        if name not in direction or direction[name].shape != x.shape or direction[name].dtype != x.dtype:
            found = f"{tuple(direction[name].shape)} {direction[name].dtype}" if name in direction else "missing"
            raise ValueError(f"{what} of {name!r} is {found}, and the parameter is {tuple(x.shape)} {x.dtype}")


def _check_factors(at: Any, u: Any, v: Any, s: Any = None) -> None:
    for what, tensors in (
        ("the parameters", at),
        ("the left factors", u),
        ("the right factors", v),
        ("the cores", {} if s is None else s),
    ):
        _check_tensors(what, tensors)
    for name, x in at.items():
        if name not in u:
            raise ValueError(f"{name!r} has no left factor")
        if name not in v:
            continue
        factors = [u[name], v[name]]
        if s is not None and name not in s:
            raise ValueError(f"{name!r} has no core")
        factors += [] if s is None else [s[name]]
        wanted = (
            [(rows, factors[0].shape[-1]) for rows in (*x.shape, factors[0].shape[-1])] if x.dim() == 2 and factors[0].dim() else []
        )
        if [tuple(f.shape) for f in factors] != wanted[: len(factors)] or not factors[0].shape[-1]:
            shapes = ", ".join(str(tuple(f.shape)) for f in factors)
            raise ValueError(f"the factors of {name!r} are {shapes}, which do not make {tuple(x.shape)}")
        if any(f.dtype != x.dtype for f in factors):
            raise TypeError(f"the factors of {name!r} are of another dtype than {x.dtype}")
