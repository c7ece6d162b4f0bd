"""The noise of published trainers: torch's global generator, drawn in their order and applied in place.

It gives parity with a published run. Like theirs, the stream depends on the kind of device, the placement and the version of
PyTorch. Dense noise has to be drawn for one whole parameter at a time, because the generator's draws cannot be split.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .listed import Pairs


def draw_dense(p: Tensor) -> Tensor:
    """Draws Z of the parameter's shape and dtype. It is the one temporary of that size which this stream needs."""
    return torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)


def dense_draws(pairs: Pairs, seed: int | None) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yields name, storage and Z of each parameter in order.

    Args:
        seed: None continues the global generator.
    """
    if seed is not None:
        torch.manual_seed(seed)
    for name, p, *_ in pairs:
        yield name, p.detach(), draw_dense(p)


def perturb_dense(pairs: Pairs, seed: int | None, scale: float) -> None:
    """X += scale * Z (MeZO)."""
    for _, x, z in dense_draws(pairs, seed):
        x.add_(z, alpha=scale)


def update_dense(
    pairs: Pairs, seed: int | None, gradient: float, *, lr: float, weight_decay: float, without: tuple[str, ...]
) -> None:
    """X <- (1 - lr * weight_decay) X + gradient * Z, without weight decay for names that contain a word of ``without``."""
    for name, x, z in dense_draws(pairs, seed):
        decay(x, name, lr, weight_decay, without)
        x.add_(z, alpha=gradient)


def decay_factor(name: str, lr: float, weight_decay: float, without: tuple[str, ...]) -> float:
    """1 - lr * weight_decay, or 1 for a name that contains a word of ``without``."""
    return 1.0 if any(word in name for word in without) else 1.0 - lr * weight_decay


def decay(x: Tensor, name: str, lr: float, weight_decay: float, without: tuple[str, ...]) -> None:
    """X *= :func:`decay_factor`, if that is not 1."""
    factor = decay_factor(name, lr, weight_decay, without)
    if factor != 1.0:
        x.mul_(factor)
