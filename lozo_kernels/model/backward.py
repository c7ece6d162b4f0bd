"""Training through ``loss.backward()``: one small parameter whose gradient is what two forward passes found out.

A loop that was written for back-propagation calls the model, ``loss.backward()`` and ``optimizer.step()``, and in between
libraries average, accumulate, scale and clip gradients. A driven model makes all evaluations of a step in its one call and returns
a loss that hangs on a single parameter. Backward gives that parameter the projected gradient, and everything that is done to
gradients is done to it. Nothing else of the model requires a gradient, so no graph is built and no gradient allocated.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from .modules import children_by_name, compiled_call

DRIVES = ("closure", "backward", "loss")
NAME = "projected_gradient"
"""Of the module that a driven model has more; its parameter is ``projected_gradient.value``."""

SHRINK = 2.0**-40
"""Gradients are stored times this, which is exact, so that no clipping norm ever acts on them: a projected gradient is not a
gradient's norm, and clipping it would change the algorithm."""


class EstimatingOptimizer(Protocol):
    """What a driven model asks of its optimiser."""

    directions: int
    param_groups: list[dict[str, Any]]

    def estimate(self, closure: Callable[[], Any]) -> tuple[Tensor, Tensor]:
        """Evaluates a loss at the points of the present step and leaves the weights where they were.

        Returns:
            (3, directions) fp64: projected gradients, F(+) and F(-); and the loss of the step, 0-dim fp64.
        """
        ...


class ProjectedGradient(nn.Module):
    """Holds the parameter; the last child of a driven model, so that ``model.dtype`` and the like look at real weights first.

    ``value`` is (3, directions) fp64 zeros. Its gradient is c, F(+) and F(-) times :data:`SHRINK`, so that the losses of
    micro-batches and processes are averaged as their projected gradients are. Checkpoints do not have it.
    """

    def __init__(self, directions: int, device: torch.device) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(3, directions, dtype=torch.float64, device=device))

    def forward(self, x: Any) -> Any:
        """The input: a driven ``nn.Sequential`` runs its children."""
        return x

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ProjectedGradient:
        super()._apply(fn, recurse)
        if self.value.dtype != torch.float64:  # model.half() is about the model
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


class Backward:
    """Makes a patched model's losses hang on one parameter. Made by :func:`~lozo_kernels.patch`, found as ``Handle.backward``.

    Args:
        model: it is not sharded.
        intercept: calls of the model evaluate by themselves (``drive="backward"``). Otherwise whoever computes the loss outside
            of the model calls :meth:`project` (``drive="loss"``).

    Raises:
        TypeError: the model is wrapped for several devices; wrap it after patching.
        ValueError: it has a ``projected_gradient`` already.
    """

    def __init__(self, model: nn.Module, *, intercept: bool = True) -> None:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise TypeError(f"{type(model).__name__} is wrapped around a model after it was patched: patch model.module before")
        if hasattr(model, NAME):
            raise ValueError(f"the model has a {NAME!r} of its own, which is where drive='backward' puts its parameter")
        self.model = model
        self._optimizer: Callable[[], EstimatingOptimizer | None] = lambda: None
        self._checked = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        for p in model.parameters():
            p.requires_grad_(False)
        # Not the forward: a probe may replace that, and each evaluation has to run what it put there.
        self._place = "_call_impl" if compiled_call(model) is None else "_compiled_call_impl"
        self._before = model.__dict__.get(self._place)
        self._call: Callable[..., Any] = getattr(model, self._place)
        if intercept:
            model.__dict__[self._place] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A call of the model; in train mode with gradients enabled, all evaluations of it.

        Returns:
            What the model returned at the last point that was evaluated, with a loss that can be backpropagated.

        Raises:
            RuntimeError: no optimiser was built on the handle.
            TypeError: the model did not return a loss.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self._call(*args, **kwargs)
        if "torch._dynamo" in sys.modules:  # torch.compile(model) would trace what moves the weights
            return torch.compiler.disable(self._evaluate)(*args, **kwargs)
        return self._evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = None

        def closure() -> Any:
            nonlocal output
            output = self._call(*args, **kwargs)
            return _loss_of(output)

        loss = self.project(closure)
        return _with_loss(output, loss)

    def project(self, closure: Callable[[], Any]) -> Tensor:
        """Evaluates a loss at the points of the present step.

        Args:
            closure: returns the loss, a one-element tensor or a number.

        Returns:
            The loss of the step as the closure returned it (at least fp32), on whose graph is the one parameter.

        Raises:
            RuntimeError: no optimiser was built on the handle.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the model is driven by backward() but has no optimiser: build one on the handle, e.g. LOZO(handle)")
        if not self._checked:
            _stop_checkpointing(self.model)
            self._checked = True
        last: Any = None

        def evaluated() -> Any:
            nonlocal last
            last = closure()
            return last

        gradient, loss = optimizer.estimate(evaluated)
        if isinstance(last, Tensor):
            dtype = torch.promote_types(last.dtype, torch.float32) if last.is_floating_point() else torch.float32
            loss = loss.to(dtype).reshape(last.shape)
        else:
            loss = loss.float().to(self.value.device)
        return _Hang.apply(self.value, loss, gradient * SHRINK)  # type: ignore[no-any-return]

    @property
    def value(self) -> nn.Parameter:
        """The parameter."""
        return getattr(self.model, NAME).value  # type: ignore[no-any-return]

    @property
    def gradient(self) -> Tensor | None:
        """(3, directions) fp64: c, F(+) and F(-) as backward has accumulated them since the last step, or None."""
        grad = self.value.grad
        return None if grad is None else grad / SHRINK

    def take(self) -> Tensor:
        """The gradient, which is then gone, so that the next step starts anew.

        Raises:
            RuntimeError: there is none.
        """
        gradient = self.gradient
        if gradient is None:
            raise RuntimeError(
                "step() found no projected gradient: call the model in train mode and backward() on its loss first, once or more "
                "for each step"
            )
        self.value.grad = None
        return gradient

    def connect(self, optimizer: EstimatingOptimizer, device: torch.device) -> None:
        """Gives the model its parameter and the optimiser the parameter, in its first group, where a GradScaler looks for it."""
        old = getattr(self.model, NAME, None)
        if old is None or old.value.shape[1] != optimizer.directions:
            self.model.add_module(NAME, ProjectedGradient(optimizer.directions, device))
        optimizer.param_groups[0]["params"].append(self.value)
        optimizer.param_groups[0]["param_names"].append(f"{NAME}.value")
        self._optimizer = weakref.ref(optimizer)
        self._checked = False

    def average_when(self, ready: Callable[[], bool]) -> None:
        """Averages the gradient over all processes after each backward for which ``ready()``.

        For losses that DistributedDataParallel does not see: its hooks are silent after forward passes without a graph.
        """

        def average(value: Tensor) -> None:
            if value.grad is not None and ready():
                distributed.all_reduce(value.grad)
                value.grad /= distributed.get_world_size()

        self._hooks.append(self.value.register_post_accumulate_grad_hook(average))

    def remove(self) -> None:
        """Gives the model its calls back, and to its parameters that they require gradients."""
        if self.model.__dict__.get(self._place) is self:
            del self.model.__dict__[self._place]
            if self._before is not None:
                self.model.__dict__[self._place] = self._before
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        children_by_name(self.model).pop(NAME, None)
        parameters = dict(self.model.named_parameters())
        for name in self._frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise TypeError("a driven model cannot be copied: copy it before patching, or load its state_dict() into another")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a driven model cannot be pickled: save its state_dict(), or call the handle's restore() first")


class _Hang(torch.autograd.Function):
    """A loss whose derivative by one parameter is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradient, ctx.device = gradient, value.device
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = ctx.gradient.to(ctx.device)
        return gradient * grad.reshape(()).to(gradient), None, None


def _loss_of(output: Any) -> Tensor:
    """The loss in what a model returned.

    Raises:
        TypeError: there is none.
    """
    loss = output
    if isinstance(output, Mapping):
        loss = output.get("loss")
    elif hasattr(output, "loss"):
        loss = output.loss
    elif isinstance(output, (tuple, list)) and output:
        loss = output[0]
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    if isinstance(output, Mapping):
        what = "only " + ", ".join(map(str, output))
    elif isinstance(loss, Tensor):
        what = f"a tensor of shape {tuple(loss.shape)}"
    else:
        what = type(output).__name__
    raise TypeError(
        f"in train mode a driven model must return its loss, one number, as .loss or first; it returned {what}: pass labels, or, "
        "for a loss that is computed outside of the model, use lozo_kernels.hf.attach(trainer) or step(closure)"
    )


def _with_loss(output: Any, loss: Tensor) -> Any:
    """What the model returned, with another loss."""
    if isinstance(output, Tensor):
        return loss
    if isinstance(output, Mapping):
        output["loss"] = loss  # type: ignore[index]
    elif hasattr(output, "_replace"):
        return output._replace(loss=loss) if hasattr(output, "loss") else output._replace(**{output._fields[0]: loss})
    elif hasattr(output, "loss"):
        output.loss = loss
    else:
        return type(output)((loss, *output[1:]))
    return output


def _stop_checkpointing(model: nn.Module) -> None:
    for word in ("activation", "gradient"):  # the newer and the older name in transformers
        state = getattr(model, f"is_{word}_checkpointing", None)
        if state:
            getattr(model, f"{word}_checkpointing_disable")()
            warnings.warn("gradient checkpointing was switched off: forward passes without a graph keep nothing", stacklevel=4)
        if state is not None:
            return
