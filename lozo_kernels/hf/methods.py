"""The training methods by name: one row each, all driven by the same loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import InputError
from ..optim import LOZO, MeZO, SubZero, ZerothOrderOptimizer
from .baselines import FirstOrder, ForwardGradient, LoRA
from .drivers import Driver, ZerothOrder

if TYPE_CHECKING:
    from .settings import Settings

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
        make: (model, resolved settings) -> its driver; None for one that trains nothing.
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
    make: Callable[[nn.Module, Settings], Driver] | None
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
        return self.make is not None

    @property
    def low_rank(self) -> bool:
        """Its directions have a rank, and a factor that is kept for an interval."""
        return "rank" in self.uses

    def with_momentum(self, momentum: float) -> str:
        """Name of the method that this one is with a beta: LOZO and MeZO have another name with momentum than without."""
        if (momentum > 0) == (self.momentum > 0):
            return self.name
        return self.name + "-m" if momentum > 0 else self.name.removesuffix("-m")


def build_optimizer(model: nn.Module, settings: Settings) -> ZerothOrderOptimizer:
    """The zeroth-order optimiser that resolved settings ask for; the model is patched.

    Raises:
        InputError: the model has nothing that can be trained so.
    """
    method = METHODS[settings.method]
    assert method.optimizer is not None
    names = ["lr", "weight_decay", "seed", *(name for name in method.uses if name != "placement")]
    # Fused steps save passes over the weights, of which a probe makes none.
    placing = {"fuse_steps": True} if settings.placement == "inplace" else {"placement": settings.placement}
    try:
        return method.optimizer(model, parallel=settings.parallel, **placing, **{name: getattr(settings, name) for name in names})
    except (TypeError, ValueError, RuntimeError) as e:
        raise _untrainable(settings, e) from None


def build_driver(model: nn.Module, settings: Settings) -> Driver:
    """What trains the model as resolved settings ask.

    Raises:
        InputError: the model cannot be trained so.
    """
    method = METHODS[settings.method]
    if method.make is None:
        raise InputError(f"--method {method.name} trains nothing: lozo-kernels evaluate --method {method.name} scores a model")
    return method.make(model, settings)


def _zeroth_order(model: nn.Module, settings: Settings) -> Driver:
    return ZerothOrder(build_optimizer(model, settings))


def _sgd(model: nn.Module, settings: Settings) -> Driver:
    options = {"lr": settings.lr, "momentum": settings.momentum, "weight_decay": settings.weight_decay}
    return FirstOrder(model, torch.optim.SGD(_trainable(model, settings), **options))  # type: ignore[arg-type]


def _adamw(model: nn.Module, settings: Settings) -> Driver:
    options = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    return FirstOrder(model, torch.optim.AdamW(_trainable(model, settings), **options))  # type: ignore[arg-type]


def _lora(model: nn.Module, settings: Settings) -> Driver:
    assert settings.lr is not None
    return LoRA(model, lr=settings.lr, weight_decay=settings.weight_decay, seed=settings.seed)


def _forward_gradient(model: nn.Module, settings: Settings) -> Driver:
    assert settings.lr is not None
    lr, decay = settings.lr, settings.weight_decay
    try:
        return ForwardGradient(model, lr=lr, weight_decay=decay, seed=settings.seed, backend=settings.backend)
    except (TypeError, ValueError, RuntimeError) as e:
        raise _untrainable(settings, e) from None


def _trainable(model: nn.Module, settings: Settings) -> list[nn.Parameter]:
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise InputError(f"this model cannot be trained by {settings.method}: no parameter requires a gradient")
    return found


def _untrainable(settings: Settings, error: Exception) -> InputError:
    return InputError(f"this model cannot be trained by {settings.method}: {error}")


_LOZO = METHOD_SETTINGS

METHODS = {
    m.name: m
    for m in (
        Method("lozo", "LOZO", "zeroth-order", _zeroth_order, LOZO, _LOZO, published=True),
        Method("lozo-m", "LOZO-M", "zeroth-order", _zeroth_order, LOZO, _LOZO, momentum=0.9, published=True),
        Method("mezo", "MeZO", "zeroth-order", _zeroth_order, MeZO, _ZEROTH_ORDER, published=True),
        Method("mezo-m", "MeZO-M", "zeroth-order", _zeroth_order, MeZO, _ZEROTH_ORDER, momentum=0.9, published=True),
        Method("subzero", "SubZero", "zeroth-order", _zeroth_order, SubZero, (*_ZEROTH_ORDER[:4], "rank", "interval"), lr=1e-7),
        Method("forward-grad", "Forward-Grad", "forward-gradient", _forward_gradient, uses=("backend",), forwards=1),
        Method("ft", "FT", "first-order", _adamw, lr=1e-5, embedded_lr=1e-3, lr_schedule="linear", forwards=1),
        Method("ft-adamw", "FT (AdamW)", "first-order", _adamw, lr=1e-5, embedded_lr=1e-3, lr_schedule="linear", forwards=1),
        Method("ft-sgd", "FT (SGD)", "first-order", _sgd, None, ("momentum",), 0.0, 1e-3, 0.03, lr_schedule="linear", forwards=1),
        Method("ft-lora", "FT-LoRA", "first-order", _lora, lr=1e-4, embedded_lr=1e-2, lr_schedule="linear", forwards=1),
        Method("zero-shot", "zero-shot", "evaluation", None, forwards=0),
        Method("icl", "ICL", "evaluation", None, forwards=0),
    )
}
