"""The published way of taking a step, as a yardstick for time and memory.

Written after what optsuite/LOZO and princeton-nlp/MeZO do, pass for pass: noise redrawn from torch's global generator in each of
the four passes over the weights (+eps, -2 eps, +eps, update), the product formed, and every result a new tensor that replaces
``param.data``. Their weight decay, which costs a further product even at 0, is part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class PublishedStep:
    """LOZO, LOZO-M, MeZO or MeZO-M as published.

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
        """One step; returns the first of its two losses."""
        self.step_count += 1
        seed = int(torch.randint(1_000_000_000, (), generator=self.seeds))
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
            if self._is_low_rank(p):
                if self.step_count % self.interval == 0:
                    self._draw_v(name, p)
                u = torch.randn(p.shape[0], self.rank, device=p.device, dtype=p.dtype)
                p.data = p.data + scale * (u @ self.v[name].t()) * self.eps
            else:
                z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
                p.data = p.data + scale * z * self.eps

    def _update(self, seed: int, c: float) -> None:
        torch.manual_seed(seed)
        for name, p in self.named:
            if not self._is_low_rank(p):
                z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
                self._apply(p, self._averaged(name, c * z))
                continue
            u = torch.randn(p.shape[0], self.rank, device=p.device, dtype=p.dtype)
            if not self.momentum:
                self._apply(p, c * (u @ self.v[name].t()))
                continue
            if name in self.old_v:
                old = self.old_v.pop(name)
                self.average[name] = self.average[name] @ old.t() @ self.v[name] / p.shape[1]
            self._apply(p, self._averaged(name, c * u) @ self.v[name].t())

    def _draw_v(self, name: str, p: Tensor) -> None:
        if name in self.average and name not in self.old_v:
            self.old_v[name] = self.v[name]
        self.v[name] = torch.randn(p.shape[1], self.rank, device=p.device, dtype=p.dtype)

    def _averaged(self, name: str, gradient: Tensor) -> Tensor:
        if not self.momentum:
            return gradient
        if name in self.average:
            gradient = self.momentum * self.average[name] + (1 - self.momentum) * gradient
        self.average[name] = gradient
        return gradient

    def _apply(self, p: nn.Parameter, gradient: Tensor) -> None:
        p.data = p.data - self.lr * (gradient + self.weight_decay * p.data)

    def _is_low_rank(self, p: Tensor) -> bool:
        return self.low_rank and p.dim() == 2
