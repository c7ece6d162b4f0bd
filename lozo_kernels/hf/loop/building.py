"""building."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from ...errors import InputError
from ...optim.optimizer import ZerothOrderOptimizer
from ..methods import METHODS
from .baselines import FirstOrder, ForwardGradient, LoRA
from .drivers import Driver, ZerothOrder

if TYPE_CHECKING:
    from ..settings import Settings


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
    if not method.trains:
        raise InputError(f"--method {method.name} trains nothing: lozo-kernels evaluate --method {method.name} scores a model")
    return _MAKERS.get(method.name, _zeroth_order)(model, settings)


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


_MAKERS: dict[str, Callable[[nn.Module, Settings], Driver]] = {
    "forward-grad": _forward_gradient,
    "ft": _adamw,
    "ft-adamw": _adamw,
    "ft-sgd": _sgd,
    "ft-lora": _lora,
}
"""What trains by other means than a zeroth-order optimiser."""
