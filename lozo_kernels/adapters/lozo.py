"""LOZO's trainers (optsuite/LOZO), large and medium, with and without momentum."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .base import Settings, TrainerAdapter, learning_rate
from .listed import decay_of_names
from .mezo import WITHOUT_DECAY
from .streams import decay, decay_factor, draw_dense


class LozoAdapter(TrainerAdapter):
    """Serves ``lowrank_zo_perturb_parameters``, ``lowrank_zo_update`` and, if there is one, ``lowrank_zo_update_momentum``.

    U and the noise of one-dimensional tensors depend on the step's ``zo_random_seed``, V on the adapter's seed and the window
    ``step // step_interval``: the update follows the direction that was evaluated also where V is new, and a run goes on from a
    checkpoint with the V that it had. ``trainer.v`` and ``trainer.exp_avg_m`` show the factors in use; N is re-projected to a new V
    through an r x r product.
    """

    family = "LOZO"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        args = trainer.args
        rank = getattr(args, "rank_r", None)
        self._rank: int = args.rank if rank is None else rank
        self._interval: int = args.step_interval

    def serve(self) -> None:
        self._moved = self._weights("lowrank", self._rank, self._interval)
        self._replace("lowrank_zo_perturb_parameters", self._perturb)
        self._replace("lowrank_zo_update", self._update)
        if hasattr(self.trainer, "lowrank_zo_update_momentum"):
            self._replace("lowrank_zo_update_momentum", self._update_momentum)

    def release(self) -> None:
        """Leaves V and N in the dtype of the parameters, as the published methods keep them."""
        t = self.trainer
        dtypes = {name: p.dtype for name, p, *_ in getattr(t, "named_parameters_to_optim", ())}
        for state in (getattr(t, "v", {}), getattr(t, "exp_avg_m", {})):
            state.update({name: value.to(dtypes[name], copy=True) for name, value in state.items() if name in dtypes})

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        pairs, seed = t.named_parameters_to_optim, t.zo_random_seed if random_seed is None else random_seed
        self._moved.perturb(pairs, seed, scaling_factor * t.args.zo_eps, step=t.step)
        if not t.v:  # these views stay valid
            t.v.update(self._moved.factors(pairs, t.step))

    def _update(self) -> None:
        t = self.trainer
        pairs, lr = t.named_parameters_to_optim, learning_rate(t)
        self._moved.update(pairs, t.zo_random_seed, -lr * t.projected_grad, decay=self._decay(lr), step=t.step)
        t.lr_scheduler.step()

    def _update_momentum(self) -> None:
        t = self.trainer
        pairs, lr, beta = t.named_parameters_to_optim, learning_rate(t), t.args.beta1
        first = not self._moved.listed(pairs, t.step).handle.momentum  # the published N starts as c U, not (1 - beta) c U
        coefficient = t.projected_grad * (1.0 if first else 1.0 - beta)
        decays = self._decay(lr)
        self._moved.update_momentum(pairs, t.zo_random_seed, coefficient, beta=beta, lr=lr, decay=decays, step=t.step)
        if not t.exp_avg_m:
            t.exp_avg_m.update(self._moved.momentum(pairs, t.step))
        t.lr_scheduler.step()

    def _decay(self, lr: float) -> Tensor | None:
        t = self.trainer
        if not t.args.weight_decay:
            return None
        names = self._moved.listed(t.named_parameters_to_optim, t.step).handle.names
        return decay_of_names(names, WITHOUT_DECAY, lr, t.args.weight_decay)


class PublishedLozoAdapter(TrainerAdapter):
    """Serves the same methods with the published stream and its defect, but without temporaries of the size of a matrix.

    Every ``step_interval`` steps the perturbation draws V before U, and the update, from the same seed, only U: it moves along
    other noise than was evaluated, one-dimensional tensors after the first matrix included. With an interval of 1, N never
    accumulates.
    """

    family = "LOZO"
    notes = ("where V is drawn anew, the update moves along noise that was not probed, as published",)

    def serve(self) -> None:
        rank = getattr(self.trainer.args, "rank_r", None)
        self._rank: int = self.trainer.args.rank if rank is None else rank
        self._replace("lowrank_zo_perturb_parameters", self._perturb)
        self._replace("lowrank_zo_update", self._update)
        if hasattr(self.trainer, "lowrank_zo_update_momentum"):
            self._replace("lowrank_zo_update_momentum", self._update_momentum)

    def _draws(self, seed: int, *, renew: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields name, storage and U (or Z) of each parameter in their order. With ``renew``, V is drawn before each U."""
        t = self.trainer
        self._check()
        torch.manual_seed(seed)
        for name, p in t.named_parameters_to_optim:
            if p.dim() < 2:
                yield name, p.detach(), draw_dense(p)
                continue
            like: Any = {"device": p.device, "dtype": p.dtype}
            if renew:
                t.v[name] = torch.randn(p.shape[1], self._rank, **like)
            yield name, p.detach(), torch.randn(p.shape[0], self._rank, **like)

    def _check(self) -> None:
        for name, p in self.trainer.named_parameters_to_optim:
            if p.dim() > 2:
                raise ValueError(f"published LOZO has no direction for {name!r}, which has {p.dim()} dimensions: leave compat out")

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        scale = scaling_factor * t.args.zo_eps
        seed = t.zo_random_seed if random_seed is None else random_seed
        for name, x, u in self._draws(seed, renew=t.step % t.args.step_interval == 0):
            if x.dim() < 2:
                x.add_(u, alpha=scale)
            else:
                x.addmm_(u, t.v[name].t(), alpha=scale)

    def _update(self) -> None:
        t = self.trainer
        lr = learning_rate(t)
        for name, x, u in self._draws(t.zo_random_seed, renew=False):
            self._move(name, x, u, lr, -lr * t.projected_grad)
        t.lr_scheduler.step()

    def _update_momentum(self) -> None:
        t = self.trainer
        lr = learning_rate(t)
        for name, x, u in self._draws(t.zo_random_seed, renew=False):
            self._average(name, u, matrix=x.dim() > 1)
            self._move(name, x, t.exp_avg_m[name], lr, -lr)
        t.lr_scheduler.step()

    def _average(self, name: str, u: Tensor, *, matrix: bool) -> None:
        """Updates N, case by case as published, but re-projects it to a new V through an r x r product."""
        t, beta, interval = self.trainer, self.trainer.args.beta1, self.trainer.args.step_interval
        fresh = t.step == 0
        if matrix:
            v = t.v[name]
            fresh = t.step % interval == 0 and name not in t.v_old
            if t.step % interval == 0 and not fresh:
                v_old = t.v_old[name]
                t.exp_avg_m[name] = t.exp_avg_m[name] @ (v_old.t() @ v) / len(v_old)
            elif not fresh and t.step % interval == interval - 1:
                t.v_old[name] = v
        t.exp_avg_m[name] = t.projected_grad * u if fresh else beta * t.exp_avg_m[name] + (1 - beta) * t.projected_grad * u

    def _move(self, name: str, x: Tensor, f: Tensor, lr: float, alpha: float) -> None:
        wd = self.trainer.args.weight_decay
        if x.dim() < 2:
            decay(x, name, lr, wd, WITHOUT_DECAY)
            x.add_(f, alpha=alpha)
        else:
            x.addmm_(f, self.trainer.v[name].t(), beta=decay_factor(name, lr, wd, WITHOUT_DECAY), alpha=alpha)
