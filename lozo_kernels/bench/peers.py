"""What this library is measured against: each function makes one pass over the weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .op_calls import EPS, PARTS
from .published import column_noise, descended, perturbed_dense, perturbed_low_rank, row_noise

Pass = Callable[[], None]


def inplace_pass(buffer: Tensor) -> Pass:
    """Reads and writes every byte once in place: fp32 ``mul_`` by numbers near 1 whose product is 1."""
    factors = itertools.cycle((1.0 + 2.0**-10, 1.0 / (1.0 + 2.0**-10)))

    def run() -> None:
        buffer.mul_(next(factors))

    return run


def copy_pass(source: Tensor) -> Pass:
    """Reads every byte of a buffer and writes every byte of another."""
    target = torch.empty_like(source)

    def run() -> None:
        target.copy_(source)

    return run


def addmm_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """The best eager way to perturb: ``X.addmm_(U, V.T)``, with U and V made beforehand."""
    factors = _factors(xs, rank)
    alphas = _alternating(EPS)

    def run() -> None:
        alpha = next(alphas)
        for x, (u, v) in zip(xs, factors, strict=True):
            x.addmm_(u, v.t(), alpha=alpha)

    return run


def addmm_momentum_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """The eager update of LOZO-M, with U and V made beforehand; restoring would take another pass."""
    factors = _factors(xs, rank)
    momenta = [torch.randn(u.shape, device=u.device, dtype=torch.float32) for u, _ in factors]
    fp32_us = [u.float() for u, _ in factors]
    alphas = _alternating(1e-4)

    def run() -> None:
        alpha = next(alphas)
        for x, (_, v), u, n in zip(xs, factors, fp32_us, momenta, strict=True):
            n.mul_(0.9).add_(u, alpha=0.1)
            x.addmm_(n.to(x.dtype), v.t(), alpha=alpha)

    return run


def signed_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """The eager update of GRZO: ``X.addcmul_(U V^T, R^T S)``, with U, V, and the signs R and S of the parts made beforehand."""
    factors = _factors(xs, rank)
    signs = [[torch.randn(PARTS, size, device=x.device, dtype=torch.float32).sign().to(x.dtype) for size in x.shape] for x in xs]
    values = _alternating(EPS)

    def run() -> None:
        value = next(values)
        for x, (u, v), (r, s) in zip(xs, factors, signs, strict=True):
            x.addcmul_(u @ v.t(), r.t() @ s, value=value)

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
    scales = _alternating(1.0)
    return _replacing(list(zip(xs, _vs(xs, rank), strict=True)), lambda x, v, s: perturbed_low_rank(x, v, s, EPS), scales)


def published_lozo_m_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """LOZO-M's update as published (medium-sized models), without the restoring pass before it. Drawing U is part of it."""
    momenta = [row_noise(x, rank) for x in xs]
    lr, beta, c, weight_decay = 1e-6, 0.9, 1.0, 0.0

    def updated(x: Tensor, v: Tensor, i: int, _: float) -> Tensor:
        momenta[i] = beta * momenta[i] + (1 - beta) * c * row_noise(x, rank)
        return descended(x, momenta[i] @ v.t(), lr, weight_decay)

    return _replacing(list(zip(xs, _vs(xs, rank), range(len(xs)), strict=True)), updated)


def published_mezo_pass(xs: Sequence[Tensor]) -> Pass:
    """MeZO's perturbation as published; drawing Z is part of it."""
    return _replacing([(x,) for x in xs], lambda x, s: perturbed_dense(x, s, EPS), _alternating(1.0))


def compiled_lozo_pass(xs: Sequence[Tensor], rank: int) -> Pass:
    """LOZO's published perturbation through ``torch.compile``, its noise included."""
    return _replacing(list(zip(xs, _vs(xs, rank), strict=True)), _compile(lambda x, v, _: x + (row_noise(x, rank) @ v.t()) * EPS))


def compiled_mezo_pass(xs: Sequence[Tensor]) -> Pass:
    """MeZO's published perturbation through ``torch.compile``, its noise included."""
    return _replacing([(x,) for x in xs], _compile(lambda x, _: x + torch.randn_like(x) * EPS))


def _replacing(
    arguments: Sequence[tuple[Any, ...]], expression: Callable[..., Tensor], scales: Iterator[float] | None = None
) -> Pass:
    """Makes a pass that evaluates an expression for each of the arguments and lets the value replace a parameter's data.

    Args:
        expression: called with one of the arguments and the scale of the pass.
        scales: one for each pass; None for always 1.
    """
    param = nn.Parameter(torch.empty(0, dtype=torch.float32, device="cpu"), requires_grad=False)

    def run() -> None:
        torch.manual_seed(0)
        scale = 1.0 if scales is None else next(scales)
        for given in arguments:
            param.data = expression(*given, scale)

    return run


def _compile(expression: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compiles an expression. Every shape gets code of its own, as long as there are no more shapes than torch allows."""
    torch.compiler.reset()  # code of other calls counts against the limit of shapes
    return torch.compile(expression, fullgraph=True, dynamic=False)


def _factors(xs: Sequence[Tensor], rank: int) -> list[tuple[Tensor, Tensor]]:
    """Makes U and V of every matrix in its own dtype."""
    return [(row_noise(x, rank), column_noise(x, rank)) for x in xs]


def _vs(xs: Sequence[Tensor], rank: int) -> list[Tensor]:
    return [column_noise(x, rank) for x in xs]


def _alternating(value: float) -> itertools.cycle[float]:
    return itertools.cycle((value, -value))


LOWRANK: dict[str, Callable[[Sequence[Tensor], int], Pass]] = {
    "addmm": lambda xs, rank: addmm_pass(xs, rank),
    # Two draws are one product of twice the rank, once [U0 U1] and [V V] lie side by side.
    "addmm of twice the rank": lambda xs, rank: addmm_pass(xs, 2 * rank),
    "addmm momentum": lambda xs, rank: addmm_momentum_pass(xs, rank),
    "addcmul of two products": lambda xs, rank: signed_pass(xs, rank),
    "published lozo": lambda xs, rank: published_lozo_pass(xs, rank),
    "published lozo-m": lambda xs, rank: published_lozo_m_pass(xs, rank),
    "compiled lozo": lambda xs, rank: compiled_lozo_pass(xs, rank),
}
"""What the low-rank ops are compared with, on matrices and at a rank."""

DENSE: dict[str, Callable[[Sequence[Tensor]], Pass]] = {
    "published mezo": lambda xs: published_mezo_pass(xs),
    "compiled mezo": lambda xs: compiled_mezo_pass(xs),
    "foreach": lambda xs: foreach_pass(xs),
}
"""What the dense op is compared with."""
