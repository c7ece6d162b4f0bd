"""SubZero's trainer (zimingyy/SubZero): directions U S V^T in a subspace that is kept for an interval."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..kernels.noise import MAX_RANK
from ..model.estimators import Subspace
from .base import SGD, SeededAdapter, Settings, TrainerAdapter, read_sgd
from .listed import Pairs, Weights
from .streams import draw_dense

RESHAPED = ("lora", "prefix", "prompt")
"""Values of ``args.mode`` for which a parameter is seen as the most nearly square matrix of its size."""


class SubZeroAdapter(TrainerAdapter):
    """Serves ``zo_subspace_perturb_parameters`` and ``zo_subspace_update``, for ``torch.optim.SGD`` without momentum.

    U and V depend on the adapter's seed and the window ``global_step // update_interval`` (the trainer draws them from the global
    generator, which no log of seeds can repeat), S and the noise of other tensors on ``zo_random_seed``. ``p_state`` shows the
    factors in use: sqrt(rows) U, (rows, rank) fp32, and sqrt(cols) V transposed, (rank, cols) fp16.
    """

    family = "SubZero"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        self.rank: int = trainer.args.gauss_rank
        if not 1 <= self.rank <= MAX_RANK:
            raise self._refuse(f"its gauss_rank is {self.rank}, and ranks are 1 to {MAX_RANK}")

    def serve(self) -> None:
        self._dense = self._weights()
        config = dataclasses.replace(
            self._dense.config,
            estimator="subspace",
            rank=self.rank,
            interval=self.trainer.args.update_interval,
            scaling="paper",
            square=("*",) if getattr(self.trainer.args, "mode", None) in RESHAPED else (),
        )
        self._moved = Weights(config, self._dense.model, functools.partial(Subspace, whole=True))
        self._shown: dict[str, Tensor] = {}
        published = self.settings.compat == "published"
        self._replace("zo_subspace_perturb_parameters", self._published_perturb if published else self._perturb)
        self._replace("zo_subspace_update", self._published_update if published else self._update)

    def release(self) -> None:
        """Leaves orthonormal U and V in the dtype of the parameters, as the published methods keep them."""
        t = self.trainer
        for name, p, *_ in getattr(t, "named_parameters_to_optim", ()):
            if name in self._shown:
                u, v = t.p_state[name]["U"], t.p_state[name]["V"].float()
                t.p_state[name] |= {"U": (u / len(u) ** 0.5).to(p.dtype), "V": (v / v.shape[1] ** 0.5).to(p.dtype)}

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        seed = t.zo_random_seed if random_seed is None else random_seed
        scale = scaling_factor * t.args.zo_eps
        matrices, others = self._split(t.named_parameters_to_optim)
        if matrices:
            self._moved.perturb(_squeezed(matrices), seed, scale, step=t.state.global_step)
            self._show(matrices)
        if others:
            self._dense.perturb(others, seed, scale)

    def _update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        matrices, others = self._split(t.named_parameters_to_optim)
        for moved, pairs, step in ((self._moved, matrices, t.state.global_step), (self._dense, others, None)):
            if pairs:
                sgd = self._sgd(pairs)
                moved.update(_squeezed(pairs), t.zo_random_seed, -sgd.lr * t.projected_grad, decay=sgd.decay, step=step)
        self._finish()

    def _finish(self) -> None:
        self.trainer.update_steps += 1
        self.trainer.lr_scheduler.step()

    def _sgd(self, pairs: Pairs) -> SGD:
        sgd = read_sgd(self.trainer.optimizer, pairs)
        if sgd.momentum:
            raise ValueError("SubZero's SGD has momentum, a buffer as large as the weights once U and V change: set it to 0")
        return sgd

    def _show(self, matrices: Pairs) -> None:
        """Shows the factors in use in ``p_state``, anew whenever V was drawn."""
        listed = self._moved.listed(_squeezed(matrices), self.trainer.state.global_step)
        handle = listed.handle
        estimator = handle.estimator
        assert isinstance(estimator, Subspace)
        for group in handle.groups:
            for i, v in zip(group.index.tolist(), group.table.v or (), strict=False):
                p = handle.trained[i]
                name, basis = listed.raw[p.name], estimator.basis(p.tensor_id)
                if self._shown.get(name) is not basis:
                    self._shown[name] = basis
                    self.trainer.p_state.setdefault(name, {}).update(U=basis[0].float(), V=v[0])

    def _split(self, pairs: Pairs) -> tuple[Pairs, Pairs]:
        """Matrices, and the parameters that get dense noise."""
        matrices = [(name, p) for name, p, *_ in pairs if p.squeeze().dim() == 2]
        return matrices, [(name, p) for name, p, *_ in pairs if p.squeeze().dim() != 2]

    def _published_perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        t = self.trainer
        torch.manual_seed(t.zo_random_seed if random_seed is None else random_seed)
        scale = scaling_factor * t.args.zo_eps
        for _, p, u, v in t.named_parameters_to_optim:
            self._published_move(p.detach(), u, v, scale)

    def _published_update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        torch.manual_seed(t.zo_random_seed)
        for name, p, u, v in t.named_parameters_to_optim:
            sgd = self._sgd([(name, p)])
            if sgd.decay is not None:
                p.detach().mul_(sgd.decay)
            self._published_move(p.detach(), u, v, -sgd.lr * t.projected_grad)
        self._finish()

    @staticmethod
    def _published_move(x: Tensor, u: Tensor, v: Tensor, scale: Any) -> None:
        if u.dim() == 1:
            x.add_(draw_dense(x), alpha=scale)
            return
        s = torch.normal(mean=0, std=1, size=(u.shape[1], v.shape[0]), device=x.device, dtype=x.dtype)
        a = (u @ s).mul_(math.sqrt(x.numel() / s.numel()))
        x.view(u.shape[0], v.shape[1]).addmm_(a, v, alpha=scale)


class DenseSubZeroAdapter(SeededAdapter):
    """Serves ``zo_perturb_parameters`` and ``zo_update`` of the same trainer, its MeZO (``args.trainer="zo_sgd"``), which updates
    with ``torch.optim.SGD``. With ``compat="published"`` the update is the trainer's own, so that its zo_adam can be used too.
    """

    family = "SubZero (MeZO)"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        if settings.compat == "published":
            self.notes = ("the update is the trainer's own",)
        elif getattr(trainer.args, "trainer", None) == "zo_adam":
            raise self._refuse(
                "zo_adam keeps state of the size of the weights; use zo_sgd, or give compat='published', which leaves it the update"
            )

    def serve(self) -> None:
        self._replace("zo_perturb_parameters", self._perturb)
        if self.settings.compat != "published":
            self._moved = self._weights()
            self._replace("zo_update", self._update)

    def _perturb(self, random_seed: int | None = None, scaling_factor: float = 1) -> None:
        if self.settings.compat != "published":
            read_sgd(self.trainer.optimizer, self.trainer.named_parameters_to_optim)  # refused before a weight moves
        super()._perturb(random_seed, scaling_factor)

    def _update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        pairs, seed, c = t.named_parameters_to_optim, t.zo_random_seed, t.projected_grad
        sgd = read_sgd(t.optimizer, pairs)
        if sgd.momentum:
            self._moved.update_momentum(pairs, seed, c, beta=sgd.momentum, lr=sgd.lr)
        else:
            self._moved.update(pairs, seed, -sgd.lr * c, decay=sgd.decay)
        t.update_steps += 1
        t.lr_scheduler.step()


def _squeezed(pairs: Pairs) -> Pairs:
    """Replaces parameters that are matrices except for dimensions of 1 by views that are matrices."""
    return [(name, p if p.dim() <= 2 or p.squeeze().dim() != 2 else p.detach().squeeze()) for name, p, *_ in pairs]
