"""The parameter of a driven model, whose gradient holds the projected gradient of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .outputs import refuse_gradients

NAME = "projected_gradient"
"""The name of the module that is added to a driven model; its parameter is ``projected_gradient.value``."""

_ACCESSORS = ("__get__", "__set__")
"""The names of torch's functions that read and write attributes."""
_COPIES = ("detach", "to", "clone", "view", "reshape", "flatten", "ravel", "cpu", "float", "double")
"""The names of those that return the same values, which code that walks over parameters begins with."""


_OF_A_SUM = (
    "a loss term over the parameters of a driven model trains nothing, because they require no gradient: use the optimiser's "
    "weight_decay, or step(closure), which evaluates the whole loss"
)


class ProjectedValue(nn.Parameter):
    """The parameter of a :class:`ProjectedGradient`. It raises an error where code that walks over all parameters of a model would
    go wrong without a word: RuntimeError when a loss term over the parameters is differentiated, which require no gradient, and
    TypeError when they are paired with those of a copy of the model that does not have this one.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _ACCESSORS and _is_of_others(name, args[0] if args else None):
            raise TypeError(
                "parameters of a driven model were paired with those of a copy that was made before drive='backward' added "
                f"{NAME}.value, so that the two lists do not match: an average (AveragedModel, Lightning's WeightAveraging) needs "
                "step(closure) in place of drive="
            )
        with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001  (as torch's own documentation of subclasses does)
            result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or isinstance(result, ProjectedValue):
            return result
        if name in _COPIES:
            return result.as_subclass(cls)
        if result.requires_grad and torch.is_grad_enabled() and name != "expand_as":  # by which torch finds its gradient's hooks
            return refuse_gradients(result.detach(), lambda _: RuntimeError(_OF_A_SUM))
        return result


def _is_of_others(name: str, first: Any) -> bool:
    """Whether a function of torch, which has a :class:`ProjectedValue` among its arguments, works on the other tensors of it."""
    if name.startswith("_foreach_"):
        return isinstance(first, (tuple, list)) and not any(isinstance(x, ProjectedValue) for x in first)
    return isinstance(first, Tensor) and not isinstance(first, ProjectedValue)


class ProjectedGradient(nn.Module):
    """Holds the parameter. It is the last child of a driven model, so that ``model.dtype`` and the like look at real weights first.

    ``value`` is (3, directions) fp64 zeros. Its gradient is c, F(+) and F(-) times :data:`~lozo_kernels.model.backward.SHRINK`, so
    that the losses of micro-batches and processes are averaged as their projected gradients are. Checkpoints do not contain it.
    """

    def __init__(self, directions: int, device: torch.device) -> None:
        super().__init__()
        self.value = ProjectedValue(torch.zeros(3, directions, dtype=torch.float64, device=device))

    def forward(self, x: Any) -> Any:
        """Returns its input, because a driven ``nn.Sequential`` runs all of its children."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProjectedGradient:
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float64:  # model.half() is meant for the model's own parameters
            self.value.data, grad = self.value.data.double(), self.value.grad
            self.value.grad = None if grad is None else grad.double()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *_: Any) -> None:
        pass

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise RuntimeError(
            "torch.nn.DataParallel copies a model for each call, and a driven model cannot be copied: start one process per device "
            "(torchrun) with DistributedDataParallel"
        )
