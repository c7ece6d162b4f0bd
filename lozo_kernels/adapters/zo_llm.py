"""ZO-LLM's trainer (ZO-Bench/ZO-LLM), whose steps contain the update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..errors import require
from .base import SGD, SeededAdapter, Settings, read_sgd
from .listed import Pairs

STEPS = ("zo_step", "zo_step_v1", "zo_step_v2", "zo_conserv_step")
_MODULE_WISE = ("zo_step_with_module_wise_perturbation", "zo_step_with_module_wise_perturbation_coordinate")
_SEEDS = 1_000_000_000


class ZoLlmAdapter(SeededAdapter):
    """Serves ``zo_perturb_parameters`` and the steps of the trainer's zo_sgd and zo_sign_opt with ``torch.optim.SGD``.

    ``zo_step`` restores and updates in one pass. ``zo_step_v1`` and ``zo_step_v2`` take the mean over ``args.q`` directions, kept
    as seeds and scalars: v1's gradient as large as the weights is not needed, and v2's defect (only the last direction counts,
    and the update uses other noise than the evaluations) is not followed. With ``compat="published"`` only the perturbation is
    served, in place, and any optimizer can be used.
    """

    family = "ZO-LLM"

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        if getattr(trainer, "gradient_sparsity", None) is not None:
            raise self._refuse("gradient_sparsity masks single elements of the noise; set it to None")
        if settings.compat == "published":
            self.notes = ("the updates are the trainer's own",)

    def serve(self) -> None:
        self._replace("zo_perturb_parameters", self._perturb)
        if self.settings.compat == "published":
            return
        self._moved = self._weights()
        for name, step in zip(STEPS, (self._step, self._mean_step, self._mean_step, self._conservative_step), strict=True):
            if hasattr(self.trainer, name):
                self._replace(name, step)
        for name in _MODULE_WISE:
            if hasattr(self.trainer, name):
                self._replace(name, self._not_served)

    def _not_served(self, *_: Any) -> None:
        raise RuntimeError("module-wise perturbation is not served: restore() the adapter, or accelerate with compat='published'")

    def _step(self, model: Any, inputs: Any) -> Tensor:
        t = self.trainer
        pairs = self._start(model)
        sgd = read_sgd(t.optimizer, pairs)
        loss, applied = self._probe(model, inputs)
        self._apply(pairs, sgd, [t.zo_random_seed], [t.projected_grad / t.args.q], restore=-applied)
        return loss

    def _mean_step(self, model: Any, inputs: Any) -> Tensor:
        t = self.trainer
        pairs, seeds, cs = self._start(model), [], []
        sgd = read_sgd(t.optimizer, pairs)
        for _ in range(t.args.q):
            loss, applied = self._probe(model, inputs)
            if applied:
                self._moved.perturb(pairs, t.zo_random_seed, -applied)
            seeds.append(t.zo_random_seed)
            cs.append(t.projected_grad / t.args.q)
        self._apply(pairs, sgd, seeds, cs)
        return loss

    def _conservative_step(self, model: Any, inputs: Any) -> Tensor:
        """Takes a step forward, then one back past the start, and keeps the best of the three points."""
        t = self.trainer
        pairs = self._start(model)
        sgd = read_sgd(t.optimizer, pairs)
        start = t.zo_forward(model, inputs)
        _, applied = self._probe(model, inputs)
        seeds, c = [t.zo_random_seed], t.projected_grad
        self._apply(pairs, sgd, seeds, [c], restore=-applied)
        forward = t.zo_forward(model, inputs)
        self._apply(pairs, sgd, seeds, [-2.0 * c])
        back = t.zo_forward(model, inputs)
        if forward > start:
            if start < back:
                self._apply(pairs, sgd, seeds, [c])
        elif forward < back:
            self._apply(pairs, sgd, seeds, [2.0 * c])
        return forward

    def _start(self, model: Any) -> Pairs:
        t = self.trainer
        if t.args.gradient_accumulation_steps != 1:
            raise ValueError(f"{self.family} takes gradient_accumulation_steps=1, not {t.args.gradient_accumulation_steps}")
        t.named_parameters_to_optim = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        return t.named_parameters_to_optim

    def _probe(self, model: Any, inputs: Any) -> tuple[Tensor, float]:
        """Returns F(+) and the scale of the perturbation that is still applied; seed and c are left in the trainer."""
        t, eps = self.trainer, self.trainer.args.zo_eps
        t.zo_random_seed = require("numpy").random.randint(_SEEDS)  # the trainer's own generator
        self._perturb(scaling_factor=1)
        plus = t.zo_forward(model, inputs)
        one_sided = t.args.perturbation_mode == "one_side"
        self._perturb(scaling_factor=-1 if one_sided else -2)
        minus = t.zo_forward(model, inputs)
        t.projected_grad = ((plus - minus) / (eps if one_sided else 2 * eps)).item()
        return plus, 0.0 if one_sided else -eps

    def _apply(self, pairs: Pairs, sgd: SGD, seeds: Sequence[int], cs: Sequence[float], *, restore: float = 0.0) -> None:
        """Does what SGD does with the sum of c D(seed) as the gradient, in one pass for each seed."""
        if self.trainer.args.trainer == "zo_sign_opt":
            cs = [math.copysign(1.0 / len(cs), c) if c else 0.0 for c in cs]
        last = len(seeds) - 1
        for i, (seed, c) in enumerate(zip(seeds, cs, strict=True)):
            if sgd.momentum:
                beta, lr = (sgd.momentum if i == 0 else 1.0), (sgd.lr if i == last else 0.0)
                self._moved.update_momentum(pairs, seed, c, beta=beta, lr=lr, restore=restore, index=i)
            else:
                decay = sgd.decay if i == 0 else None
                self._moved.update(pairs, seed, -sgd.lr * c, decay=decay, restore=restore, index=i)
