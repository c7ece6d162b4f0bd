"""What this library is measured against, one pass over the weights each.

The published expressions are those of optsuite/LOZO (``LOZOtrainer.py``) and princeton-nlp/MeZO (``trainer.py``), written after
them: noise from torch's global generator in the dtype of the weight, the direction formed, and every result a new tensor that
replaces ``param.data``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .weights import EPS

Pass = Callable[[], None]


def inplace_pass(buffer: Tensor) -> Pass:
    """One read and one write of every byte in place: fp32 ``mul_`` by numbers near 1 whose product is 1."""
    factors = itertools.cycle((1.0 + 2.0**-10, 1.0 / (1.0 + 2.0**-10)))

    def run() -> None:
        buffer.mul_(next(factors))

    return run


def copy_pass(source: Tensor) -> Pass:
    """One read of every byte of a buffer and one write of every byte of another."""
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def addmm_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """The best eager way to perturb: ``X.addmm_(U, V.T)`` with U and V materialised beforehand, no noise made."""
    factors = _factors(xs, rank)
    alphas = _alternating(EPS)

    def run() -> None:
        alpha = next(alphas)
        for x, (u, v) in zip(xs, factors, strict=True):
            x.addmm_(u, v.t(), alpha=alpha)

    return run


def addmm_momentum_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """The eager update of LOZO-M with U and V materialised beforehand; restoring would take another pass."""
    factors = _factors(xs, rank)
    momenta = [torch.randn(u.shape, device=u.device) for u, _ in factors]
    fp32_us = [u.float() for u, _ in factors]
    alphas = _alternating(1e-4)

    def run() -> None:
        alpha = next(alphas)
        for x, (_, v), u, n in zip(xs, factors, fp32_us, momenta, strict=True):
            n.mul_(0.9).add_(u, alpha=0.1)
            x.addmm_(n.to(x.dtype), v.t(), alpha=alpha)

    return run


def foreach_pass(xs: Sequence[Tensor]) -> Pass:
    """MeZO's perturbation without its noise: ``torch._foreach_add_`` of Z made beforehand, as large as the weights."""
    weights = list(xs)
    zs = [torch.randn_like(x) for x in weights]
    alphas = _alternating(EPS)

    def run() -> None:
        torch._foreach_add_(weights, zs, alpha=next(alphas))

    return run


def published_lozo_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """LOZO's perturbation as published. Drawing U is part of it; V is kept, as in all but one of ``step_interval`` steps."""
    vs = [v for _, v in _factors(xs, rank)]
    param = nn.Parameter(torch.empty(0), requires_grad=False)
    scales = _alternating(1.0)

    def run() -> None:
        torch.manual_seed(0)
        scale = next(scales)
        for x, v in zip(xs, vs, strict=True):
            param.data = x
            u = torch.randn(param.data.size(0), rank, device=param.data.device, dtype=param.data.dtype)
            param.data = param.data + scale * (u @ v.t()) * EPS

    return run


def published_lozo_m_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """LOZO-M's update as published (medium-sized models), without the restoring pass before it. Drawing U is part of it."""
    factors = _factors(xs, rank)
    vs, momenta = [v for _, v in factors], [u for u, _ in factors]
    param = nn.Parameter(torch.empty(0), requires_grad=False)
    lr, beta, c, weight_decay = 1e-6, 0.9, 1.0, 0.0

    def run() -> None:
        torch.manual_seed(0)
        for i, (x, v) in enumerate(zip(xs, vs, strict=True)):
            param.data = x
            u = torch.randn(param.data.size(0), rank, device=param.data.device, dtype=param.data.dtype)
            momenta[i] = beta * momenta[i] + (1 - beta) * c * u
            param.data = param.data - lr * (momenta[i] @ v.t() + weight_decay * param.data)

    return run


def published_mezo_pass(xs: Sequence[Tensor]) -> Pass:
    """MeZO's perturbation as published; drawing Z is part of it."""
    param = nn.Parameter(torch.empty(0), requires_grad=False)
    scales = _alternating(1.0)

    def run() -> None:
        torch.manual_seed(0)
        scale = next(scales)
        for x in xs:
            param.data = x
            z = torch.normal(mean=0.0, std=1.0, size=param.data.size(), device=param.data.device, dtype=param.data.dtype)
            param.data = param.data + scale * z * EPS

    return run


def compiled_lozo_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """LOZO's published perturbation through ``torch.compile``, its noise included."""
    vs = [v for _, v in _factors(xs, rank)]

    def perturbed(x: Tensor, v: Tensor) -> Tensor:
        u = torch.randn(x.size(0), rank, device=x.device, dtype=x.dtype)
        return x + (u @ v.t()) * EPS

    return _compiled(perturbed, list(zip(xs, vs, strict=True)))


def compiled_mezo_pass(xs: Sequence[Tensor]) -> Pass:
    """MeZO's published perturbation through ``torch.compile``, its noise included."""

    def perturbed(x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, device=x.device, dtype=x.dtype) * EPS

    return _compiled(perturbed, [(x,) for x in xs])


def _compiled(function: Callable[..., Tensor], arguments: Sequence[tuple[Tensor, ...]]) -> Pass:
    """A call for each of the arguments. Every shape gets code of its own, as long as there are no more than torch allows."""
    torch._dynamo.reset()  # code of other calls counts against the limit of shapes
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    param = nn.Parameter(torch.empty(0), requires_grad=False)

    def run() -> None:
        torch.manual_seed(0)
        for tensors in arguments:
            param.data = compiled(*tensors)

    return run


def _factors(xs: Sequence[Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
    """U and V of every matrix in its own dtype."""
    return [
        (
            torch.randn(x.shape[0], rank, device=x.device, dtype=x.dtype),
            torch.randn(x.shape[1], rank, device=x.device, dtype=x.dtype),
        )
        for x in xs
    ]


def _alternating(value: float) -> itertools.cycle[float]:
    return itertools.cycle((value, -value))
