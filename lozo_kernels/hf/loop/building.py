"""Makes what trains a model, and the schedule of its learning rate, from the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ...errors import InputError, require
from ...model.config import OPTIONS
from ...optim.eps_finder import find_eps
from ...optim.optimizer import ZerothOrderOptimizer
from ...optim.rate_finder import AUTO
from ..methods import METHODS
from ..models.pretrained import first_line
from ..settings import Settings
from .baselines import FirstOrder, ForwardGradient, LoRA
from .drivers import Driver


def build_optimizer(model: nn.Module, settings: Settings) -> ZerothOrderOptimizer:
    """The zeroth-order optimiser that resolved settings ask for; the model is patched.

    Raises:
        InputError: the model has nothing that can be trained so.
    """
    method = METHODS[settings.method]
    assert method.optimizer is not None
    names = ["weight_decay", "seed", *(name for name in method.uses if name not in ("placement", "one_sided", "find_eps"))]
    # Fused steps save passes over the weights, of which a probe makes none.
    placing: dict[str, Any] = {} if method.per_example else {"two_sided": not settings.one_sided}
    if not method.per_example:
        placing |= {"fuse_steps": True} if settings.placement == "inplace" else {"placement": settings.placement}
    rates: dict[str, Any] = {"lr": AUTO if settings.lr is None else settings.lr}
    options = rates | placing | {"parallel": settings.parallel}
    try:
        return method.optimizer(model, **options, **{name: getattr(settings, name) for name in names})  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as e:
        raise _untrainable(settings, e) from None


def measure_eps(model: nn.Module, settings: Settings, loss: Callable[[], Any]) -> float:
    """The eps of :func:`lozo_kernels.find_eps` for resolved settings. Raises InputError if there is none."""
    method = METHODS[settings.method]
    options = {name: getattr(settings, name) for name in OPTIONS if name in method.uses}
    try:
        return find_eps(model, loss, **options, seed=settings.seed, estimator=method.estimator)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InputError(f"--find-eps: {e}; or give --eps") from None


def build_driver(model: nn.Module, settings: Settings) -> Driver:
    """What trains the model as resolved settings ask.

    Raises:
        InputError: the model cannot be trained so.
    """
    method = METHODS[settings.method]
    if not method.trains:
        raise InputError(f"--method {method.name} trains nothing: lozo-kernels evaluate --method {method.name} scores a model")
    if method.optimizer is not None:
        return build_optimizer(model, settings)
    rates: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if method.kind == "forward-gradient":
        try:
            return ForwardGradient(model, **rates, seed=settings.seed, backend=settings.backend)
        except (TypeError, ValueError, RuntimeError) as e:
            raise _untrainable(settings, e) from None
    if method.name == "ft-lora":
        return LoRA(model, **rates, seed=settings.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise _untrainable(settings, "no parameter requires a gradient")
    if method.name == "ft-sgd":
        return FirstOrder(torch.optim.SGD(trained, **rates, momentum=settings.momentum or 0.0))
    return FirstOrder(torch.optim.AdamW(trained, **rates))


def make_schedule(optimizer: torch.optim.Optimizer, settings: Settings) -> Any:
    """The learning-rate schedule of a run: of transformers, but for the two of which journals have the rates in these bits.

    Raises:
        InputError: the schedule does not take the options that it was given.
    """
    name, steps = settings.lr_schedule or "constant", settings.steps or 0
    warmup, options = settings.warmup(steps), settings.schedule_options
    factors = {"linear": lambda t: 1 - t / steps, "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t / steps))}
    if name in factors and not (warmup or options):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, factors[name])
    if name == "constant" and warmup:
        name = "constant_with_warmup"
    try:
        return require("transformers").get_scheduler(name, optimizer, warmup, steps, options)
    except (TypeError, ValueError) as e:
        raise InputError(f"--lr-schedule {name}: {first_line(e)}; --lr-scheduler-kwargs has its options") from None


def _untrainable(settings: Settings, reason: object) -> InputError:
    return InputError(f"this model cannot be trained by {settings.method}: {reason}")
