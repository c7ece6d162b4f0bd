"""The training methods by name: one row each, all driven by the same loop."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..optim.optimizer import LOZO, MeZO, SubZero, ZerothOrderOptimizer

if TYPE_CHECKING:
    pass

EMBEDDED_LR = 3e-4
"""Tuned for the embedded model, which is four to five orders of magnitude smaller than the models of the papers."""

METHOD_SETTINGS = ("eps", "directions", "placement", "backend", "momentum", "rank", "interval", "scaling")
"""Settings that not all methods have."""

TRAINING_SETTINGS = frozenset({"steps", "k_shot", "lr", "lr_schedule", "weight_decay", "eval_every", "compare_steps", "parallel"})
"""Settings that only methods have that train."""

_ZEROTH_ORDER = METHOD_SETTINGS[:5]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method of the command line.

    Attributes:
        label: as a table of a paper writes it.
        kind: "zeroth-order", "forward-gradient", "first-order", or "evaluation" for one that trains nothing.
        optimizer: its class, if it is zeroth-order.
        uses: those of :data:`METHOD_SETTINGS` that it has.
        momentum: default of beta, 0 for a method without.
        lr, embedded_lr: default learning rates of large models and of the embedded one.
        lr_schedule: default schedule (LOZO's paper, section 5: constant for LOZO and MeZO, linear for fine-tuning).
        forwards: forward passes of a step and direction.
        published: the published code has this method, so that it can be timed beside it.
    """

    name: str
    label: str
    kind: str
    optimizer: type[ZerothOrderOptimizer] | None = None
    uses: tuple[str, ...] = ()
    momentum: float = 0.0
    lr: float = 1e-6
    embedded_lr: float = EMBEDDED_LR
    lr_schedule: str = "constant"
    forwards: int = 2
    published: bool = False

    @property
    def trains(self) -> bool:
        """It changes weights."""
        return self.kind != "evaluation"

    @property
    def low_rank(self) -> bool:
        """Its directions have a rank, and a factor that is kept for an interval."""
        return "rank" in self.uses

    def with_momentum(self, momentum: float) -> str:
        """Name of the method that this one is with a beta: LOZO and MeZO have another name with momentum than without."""
        if (momentum > 0) == (self.momentum > 0):
            return self.name
        return self.name + "-m" if momentum > 0 else self.name.removesuffix("-m")


_LOZO = METHOD_SETTINGS

METHODS = {
    m.name: m
    for m in (
        Method("lozo", "LOZO", "zeroth-order", LOZO, _LOZO, published=True),
        Method("lozo-m", "LOZO-M", "zeroth-order", LOZO, _LOZO, momentum=0.9, published=True),
        Method("mezo", "MeZO", "zeroth-order", MeZO, _ZEROTH_ORDER, published=True),
        Method("mezo-m", "MeZO-M", "zeroth-order", MeZO, _ZEROTH_ORDER, momentum=0.9, published=True),
        Method("subzero", "SubZero", "zeroth-order", SubZero, (*_ZEROTH_ORDER[:4], "rank", "interval"), lr=1e-7),
        Method("forward-grad", "Forward-Grad", "forward-gradient", uses=("backend",), forwards=1),
        Method("ft", "FT", "first-order", lr=1e-5, embedded_lr=1e-3, lr_schedule="linear", forwards=1),
        Method("ft-adamw", "FT (AdamW)", "first-order", lr=1e-5, embedded_lr=1e-3, lr_schedule="linear", forwards=1),
        Method("ft-sgd", "FT (SGD)", "first-order", None, ("momentum",), 0.0, 1e-3, 0.03, lr_schedule="linear", forwards=1),
        Method("ft-lora", "FT-LoRA", "first-order", lr=1e-4, embedded_lr=1e-2, lr_schedule="linear", forwards=1),
        Method("zero-shot", "zero-shot", "evaluation", forwards=0),
        Method("icl", "ICL", "evaluation", forwards=0),
    )
}
