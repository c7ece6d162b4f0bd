"""MeZO's trainers (princeton-nlp/MeZO): the large one with an update method, the medium one whose update is inside ``train``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import SeededAdapter, Settings, TrainerAdapter, learning_rate
from .listed import decay_of_names
from .streams import perturb_dense, update_dense

WITHOUT_DECAY = ("bias", "layer_norm", "layernorm")
"""Words in names of parameters that MeZO and LOZO do not decay."""


class MezoAdapter(SeededAdapter):
    """Serves ``zo_perturb_parameters`` and ``zo_update`` of MeZO's large_models trainer."""

    family = "MeZO (large_models)"

    def serve(self) -> None:
        self._moved = self._weights()
        self._replace("zo_perturb_parameters", self._perturb)
        self._replace("zo_update", self._update)

    def _update(self, model: Any = None) -> None:  # noqa: ARG002  (the trainer gives its model)
        t = self.trainer
        pairs, lr, weight_decay = t.named_parameters_to_optim, learning_rate(t), t.args.weight_decay
        gradient = -lr * t.projected_grad
        if self.settings.compat == "published":
            update_dense(pairs, t.zo_random_seed, gradient, lr=lr, weight_decay=weight_decay, without=WITHOUT_DECAY)
        else:
            decay = decay_of_names(self._moved.listed(pairs).handle.names, WITHOUT_DECAY, lr, weight_decay)
            self._moved.update(pairs, t.zo_random_seed, gradient, decay=decay)
        t.lr_scheduler.step()


class MediumMezoAdapter(TrainerAdapter):
    """Serves ``efficient_perturb_parameters`` of MeZO's medium_models trainer, and the update that its ``train`` makes inline.

    The third perturbation of a step restores the weights, and both losses are known by then: it restores and updates in one
    pass. The list of parameters, which ``train`` makes anew in every step, is then emptied, so that the inline update finds nothing
    to do. With ``compat="published"`` perturbations are served and the inline update is the trainer's.
    """

    family = "MeZO (medium_models)"
    notes = ("the update is made with the restoring perturbation of a step, the third",)

    def __init__(self, trainer: Any, settings: Settings) -> None:
        super().__init__(trainer, settings)
        args = trainer.args
        if not getattr(args, "efficient_zero_order", True):
            raise self._refuse("without efficient_zero_order it keeps Z in memory; turn it on")
        if settings.compat == "published":
            self.notes = ("the update is the trainer's own",)
        elif getattr(args, "zero_order_use_trainer_optim", False):
            raise self._refuse("zero_order_use_trainer_optim stores a gradient as large as the weights; turn it off")

    def serve(self) -> None:
        self._moved = self._weights()
        self._losses: list[Tensor] = []
        self._applied: tuple[int | None, float] = (None, 0.0)
        if self.settings.compat == "published":
            self._replace("efficient_perturb_parameters", self._published)
            return
        forward = self.trainer.zo_forward

        def listen(*args: Any, **kwargs: Any) -> Any:
            loss = forward(*args, **kwargs)
            self._losses.append(loss)
            return loss

        self._replace("zo_forward", listen)
        self._replace("efficient_perturb_parameters", self._perturb)

    def _published(self, model: Any, random_seed: int, scaling_factor: float = 1) -> Any:
        t = self.trainer
        perturb_dense(t.named_parameters_to_optim, random_seed, scaling_factor * t.args.zero_order_eps)
        return model

    def _perturb(self, model: Any, random_seed: int, scaling_factor: float = 1) -> Any:
        t = self.trainer
        seed, applied = self._applied
        applied = scaling_factor + (applied if seed == random_seed else 0.0)
        pairs, scale = t.named_parameters_to_optim, scaling_factor * t.args.zero_order_eps
        if seed != random_seed:
            self._losses.clear()
        if applied or seed != random_seed or len(self._losses) < 2:
            self._moved.perturb(pairs, random_seed, scale)
            self._applied = random_seed, applied
            return model
        plus, minus = self._losses[-2:]
        lr, c = t.args.learning_rate, (plus - minus) / (2 * t.args.zero_order_eps)
        decay = 1.0 - lr * t.args.weight_decay if t.args.weight_decay else None
        self._moved.update(pairs, random_seed, -lr * c, decay=decay, restore=scale)
        self._applied = None, 0.0
        self._losses.clear()
        t.named_parameters_to_optim = []
        return model
