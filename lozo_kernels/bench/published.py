"""The published way of perturbing and updating weights, as a yardstick for time and memory.

The expressions are those of optsuite/LOZO (``LOZOtrainer.py``) and princeton-nlp/MeZO (``trainer.py``), written after them: noise
from torch's global generator in the dtype of the weight, the direction formed, and every result a new tensor that replaces
``param.data``.
:class:`PublishedStep` makes whole steps of them, and ``peers.py`` one pass over the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def row_noise(x: Tensor, rank: int) -> Tensor:
    """Draws U of a matrix (rows, cols): (rows, rank)."""
    return torch.randn(x.size(0), rank, device=x.device, dtype=x.dtype)


def column_noise(x: Tensor, rank: int) -> Tensor:
    """Draws V of a matrix (rows, cols): (cols, rank)."""
    return torch.randn(x.size(1), rank, device=x.device, dtype=x.dtype)


def dense_noise(x: Tensor) -> Tensor:
    """Draws Z, which has the shape of the weight."""
    return torch.normal(mean=0.0, std=1.0, size=x.size(), device=x.device, dtype=x.dtype)


def perturbed_low_rank(x: Tensor, v: Tensor, scale: float, eps: float) -> Tensor:
    """Perturbs a matrix as LOZO does, U drawn anew."""
    u = row_noise(x, v.size(1))
    return x + scale * (u @ v.t()) * eps


def perturbed_dense(x: Tensor, scale: float, eps: float) -> Tensor:
    """Perturbs a weight as MeZO does, Z drawn anew."""
    z = dense_noise(x)
    return x + scale * z * eps


def descended(x: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> Tensor:
    """Updates a weight. Their weight decay costs a further product even where it is 0."""
    return x - lr * (gradient + weight_decay * x)


class PublishedStep:
    """LOZO, LOZO-M, MeZO or MeZO-M as published: four passes over the weights (+eps, -2 eps, +eps, update), noise redrawn in each.

    Args:
        model: changed in place.
        low_rank: LOZO's directions, otherwise MeZO's.
        rank, interval, lr, eps, momentum, weight_decay, seed: as in :class:`lozo_kernels.LOZO`; the update has no 1/r.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        low_rank: bool,
        rank: int,
        interval: int,
        lr: float,
        eps: float,
        momentum: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        self.named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.low_rank, self.rank, self.interval = low_rank, rank, interval
        self.lr, self.eps, self.momentum, self.weight_decay = lr, eps, momentum, weight_decay
        self.seeds = torch.Generator().manual_seed(seed)
        self.step_count = -1
        self.v: dict[str, Tensor] = {}
        self.old_v: dict[str, Tensor] = {}
        self.average: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> float:
        """Takes a step and returns the first of its two losses."""
        self.step_count += 1
        seed = int(torch.randint(1_000_000_000, (), generator=self.seeds, dtype=torch.int64, device="cpu"))
        self._perturb(seed, 1)
        plus = closure()
        self._perturb(seed, -2)
        minus = closure()
        c = ((plus - minus) / (2 * self.eps)).item()
        self._perturb(seed, 1)
        self._update(seed, c)
        return float(plus)

    def _perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for name, p in self.named:
            if not self._is_low_rank(p):
                p.data = perturbed_dense(p.data, scale, self.eps)
                continue
            if self.step_count % self.interval == 0:
                self._draw_v(name, p)
            p.data = perturbed_low_rank(p.data, self.v[name], scale, self.eps)

    def _update(self, seed: int, c: float) -> None:
        torch.manual_seed(seed)
        for name, p in self.named:
            if not self._is_low_rank(p):
                gradient = self._averaged(name, c * dense_noise(p))
            elif not self.momentum:
                gradient = c * (row_noise(p, self.rank) @ self.v[name].t())
            else:
                if name in self.old_v:
                    old = self.old_v.pop(name)
                    self.average[name] = self.average[name] @ old.t() @ self.v[name] / p.shape[1]
                gradient = self._averaged(name, c * row_noise(p, self.rank)) @ self.v[name].t()
            p.data = descended(p.data, gradient, self.lr, self.weight_decay)

    def _draw_v(self, name: str, p: Tensor) -> None:
        if name in self.average and name not in self.old_v:
            self.old_v[name] = self.v[name]
        self.v[name] = column_noise(p, self.rank)

    def _averaged(self, name: str, gradient: Tensor) -> Tensor:
        if not self.momentum:
            return gradient
        if name in self.average:
            gradient = self.momentum * self.average[name] + (1 - self.momentum) * gradient
        self.average[name] = gradient
        return gradient

    def _is_low_rank(self, p: Tensor) -> bool:
        return self.low_rank and p.dim() == 2
