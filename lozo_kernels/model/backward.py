"""Training through ``loss.backward()``: the loss depends on one small parameter, whose gradient holds the projected gradient.

A loop that was written for back-propagation calls the model, ``loss.backward()`` and ``optimizer.step()``, and in between
libraries average, accumulate, scale and clip gradients. A driven model makes all evaluations of a step in one call and returns
a loss that depends on a single parameter. Backward gives that parameter the projected gradient, so all that is done to gradients
is done to it. Nothing else of the model requires a gradient, so no graph is built and no gradient allocated.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_leaves

from .modules import children_by_name, compiled_call, forward_hooks
from .outputs import loss_of, refuse_gradients, with_loss
from .projected import NAME, ProjectedGradient

DRIVES = ("closure", "backward", "loss")
SHRINK = 2.0**-40
"""The factor by which gradients are stored, which is exact. It makes them too small for any clipping norm to act on, because
clipping a projected gradient, which is not a gradient's norm, would change the algorithm."""

CHECKPOINTING_IS_IN_VAIN = "it spares what a backward pass needs, and forward passes without a graph keep nothing"
_OF_AN_OUTPUT = (
    "the loss depends on an output of shape {shape} besides the loss that the driven model returned, and only that loss is "
    "trained: for a loss that is computed outside of the model (auxiliary terms, distillation, an own compute_loss) use "
    "lozo_kernels.hf.attach(trainer) or step(closure)"
)
_OF_A_PART = (
    "the loss was made from a call of {part}, which is no call of the driven {model}, and only calls of the module that was given "
    "to patch() are evaluated: drive the module that returns the loss, or use lozo_kernels.hf.attach(trainer) or step(closure)"
)
_OF_EVAL_MODE = (
    "the driven model was called in eval mode, where nothing is trained: call model.train() before (dropout is switched off in the "
    "configuration of the model)"
)


class EstimatingOptimizer(Protocol):
    """What a driven model needs from its optimiser."""

    directions: int
    param_groups: list[dict[str, Any]]

    def estimate(self, closure: Callable[..., Any], inputs: Any = None) -> tuple[Tensor, Tensor]:
        """Evaluates a loss at the points of the current step, and leaves the weights as they were.

        Args:
            closure, inputs: as for ``step()``.

        Returns:
            (3, directions) fp64: projected gradients, F(+) and F(-); and the loss of the step, 0-dim fp64.
        """
        ...


class Backward:
    """Makes a patched model's losses depend on one parameter. Made by :func:`~lozo_kernels.patch`, found as ``Handle.backward``.

    Args:
        model: a model that is not sharded.
        intercept: calls of the model evaluate by themselves (``drive="backward"``). Otherwise the code that computes the loss
            outside of the model calls :meth:`project` (``drive="loss"``).

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
        self.intercepts = intercept
        self._optimizer: Callable[[], EstimatingOptimizer | None] = lambda: None
        self._checked = False
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._frozen = [name for name, p in model.named_parameters() if p.requires_grad]
        for p in model.parameters():
            p.requires_grad_(False)
        # Replace the call, not the forward: a probe may replace the forward, which each evaluation then has to run.
        self._place = "_call_impl" if compiled_call(model) is None else "_compiled_call_impl"
        self._before = model.__dict__.get(self._place)
        self._call: Callable[..., Any] = getattr(model, self._place)
        self._inside = False
        self._depth = 0
        self._hooked: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        if intercept:
            model.__dict__[self._place] = self
        self._parts = _parts(model) if intercept else [model, *_parts(model)]
        for part in self._parts:
            self._hooks.append(part.register_forward_pre_hook(self._enter_part, prepend=True))
            self._hooks.append(part.register_forward_hook(self._leave_part, prepend=True, always_call=True))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model; in train mode with gradients enabled, makes all evaluations of a step.

        Returns:
            What the model returned at the last point that was evaluated, with a loss that can be backpropagated.

        Raises:
            RuntimeError: no optimiser was built on the handle.
            TypeError: the model did not return a loss, or an input requires a gradient.

        All other outputs raise RuntimeError when they are differentiated, and so do outputs of the model in eval mode and of a part
        of it that is called by itself, because nothing would be learned from them.
        """
        if not torch.is_grad_enabled():
            return self._call(*args, **kwargs)
        if not self.model.training:
            with self._inner():
                output = self._call(*args, **kwargs)
            return refuse_gradients(output, self._refuse_evaluation)
        if any(map(_requires_gradient, (*args, *kwargs.values()))):
            raise TypeError(
                "an input of the driven model requires a gradient, and evaluations without a graph give it none: detach() it, and "
                "train what made it together with the model, or use step(closure)"
            )
        if "torch._dynamo" in sys.modules:  # torch.compile(model) would trace the code that moves the weights
            return torch.compiler.disable(self._evaluate)(*args, **kwargs)
        return self._evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        output: Any = None

        def closure() -> Any:
            nonlocal output
            output = self._call(*args, **kwargs)
            return loss_of(output)

        loss = self.project(closure)
        return refuse_gradients(with_loss(output, loss), self._refuse_output)

    def project(self, closure: Callable[..., Any], inputs: Any = None) -> Tensor:
        """Evaluates a loss at the points of the current step.

        Args:
            closure: returns the loss, a one-element tensor or a number; with ``inputs``, which it is called with then, the loss of
                each example, see :meth:`~lozo_kernels.optim.ZerothOrderOptimizer.step`.

        Returns:
            The loss of the step in the shape that the closure returned, 0-dim with ``inputs`` (at least fp32). Its graph leads to
            the one parameter.

        Raises:
            RuntimeError: no optimiser was built on the handle.
        """
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("the model is driven by backward() but has no optimiser: build one on the handle, e.g. LOZO(handle)")
        if not self._checked:
            _stop_checkpointing(self.model)
            self._watch_hooks()
            self._checked = True
        last: Any = None

        def evaluated(*batch: Any) -> Any:
            nonlocal last
            last = closure(*batch)
            return last

        with self._inner():
            gradient, loss = optimizer.estimate(evaluated, inputs)
        if isinstance(last, Tensor) and inputs is None:
            dtype = torch.promote_types(last.dtype, torch.float32) if last.is_floating_point() else torch.float32
            loss = loss.to(dtype).reshape(last.shape)
        else:
            loss = loss.float().to(self.value.device)
        return _Hang.apply(self.value, loss, gradient * SHRINK)  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _inner(self) -> Iterator[None]:
        """While the body runs, parts of the model are called by the model."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def _enter_part(self, *_: Any) -> None:
        """A hook on parts of the model: counts those that are called by themselves with gradients enabled, and what they call."""
        if not self._inside and torch.is_grad_enabled():
            self._depth += 1

    def _leave_part(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  (the arguments of a hook)
        """A hook on parts of the model: what one returns that was called by itself is not to be differentiated."""
        if self._inside or not torch.is_grad_enabled():
            return None
        self._depth -= 1
        if self._depth:
            return None
        model, part = type(self.model).__name__, type(module).__name__
        return refuse_gradients(output, lambda _: self._refuse(_OF_A_PART.format(model=model, part=part)))

    def _watch_hooks(self) -> None:
        """What forward hooks of the user keep of an evaluation is not to be differentiated either."""
        for module in self.model.modules():
            if forward_hooks(module) > self._parts.count(module) and module not in self._hooked:
                self._hooked.add(module)
                self._hooks.append(module.register_forward_hook(self._refuse_hooked, prepend=True))

    def _refuse_hooked(self, module: nn.Module, args: Any, output: Any) -> Any:  # noqa: ARG002  (the arguments of a hook)
        return refuse_gradients(output, self._refuse_output) if self._inside else None

    def _refuse_output(self, grad: Tensor) -> RuntimeError:
        return self._refuse(_OF_AN_OUTPUT.format(shape=tuple(grad.shape)))

    def _refuse_evaluation(self, _: Tensor) -> RuntimeError:
        return self._refuse(_OF_EVAL_MODE)

    def _refuse(self, why: str) -> RuntimeError:
        """Drops what this backward has accumulated, so that no step follows from a part of the loss."""
        self.value.grad = None
        return RuntimeError(why)

    @property
    def value(self) -> nn.Parameter:
        """The parameter that losses depend on."""
        return getattr(self.model, NAME).value  # type: ignore[no-any-return]

    @property
    def gradient(self) -> Tensor | None:
        """(3, directions) fp64: c, F(+) and F(-) as backward has accumulated them since the last step, or None."""
        grad = self.value.grad
        return None if grad is None else grad / SHRINK

    def take(self) -> Tensor:
        """Returns the gradient and clears it, so that the next step starts anew. Raises RuntimeError if there is none."""
        gradient = self.gradient
        if gradient is None:
            raise RuntimeError(
                "step() found no projected gradient: call the model in train mode and backward() on its loss first, once or more "
                "for each step"
            )
        self.value.grad = None
        return gradient

    def connect(self, optimizer: EstimatingOptimizer, device: torch.device) -> None:
        """Adds the parameter to the model, and to the optimiser's first group, where a GradScaler looks for it."""
        old = getattr(self.model, NAME, None)
        if old is None or old.value.shape[1] != optimizer.directions:
            self.model.add_module(NAME, ProjectedGradient(optimizer.directions, device))
        optimizer.param_groups[0]["params"].append(self.value)
        optimizer.param_groups[0]["param_names"].append(f"{NAME}.value")
        self._optimizer = weakref.ref(optimizer)
        self._checked = False

    def average_when(self, ready: Callable[[], bool]) -> None:
        """Averages the gradient over all processes after each backward for which ``ready()`` holds.

        It is for losses that DistributedDataParallel does not see: its hooks do not run after forward passes without a graph.
        """

        def average(value: Tensor) -> None:
            if value.grad is not None and ready():
                distributed.all_reduce(value.grad)
                value.grad /= distributed.get_world_size()

        self._hooks.append(self.value.register_post_accumulate_grad_hook(average))

    def remove(self) -> None:
        """Gives the model its own call back, removes the parameter, and makes the model's parameters require gradients again."""
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
    """A loss whose derivative with respect to one parameter is given."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:  # type: ignore[override]
        ctx.gradient, ctx.device = gradient, value.device
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        gradient = ctx.gradient.to(ctx.device)
        return gradient * grad.reshape(()).to(gradient), None, None


def _requires_gradient(x: Any) -> bool:
    """Whether an argument is, or holds, a tensor that requires a gradient."""
    if isinstance(x, Tensor):
        return x.requires_grad
    return isinstance(x, (dict, list, tuple)) and any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(x))


def _parts(model: nn.Module, depth: int = 3) -> list[nn.Module]:
    """The modules near the top of a model that a loop may call by themselves. Members of lists are left out: they are many."""
    found = []
    for part in model.children():
        found.append(part)
        if depth > 1 and not isinstance(part, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
            found += _parts(part, depth - 1)
    return found


def _stop_checkpointing(model: nn.Module) -> None:
    for word in ("activation", "gradient"):  # the newer and the older name in transformers
        state = getattr(model, f"is_{word}_checkpointing", None)
        if state:
            getattr(model, f"{word}_checkpointing_disable")()
            warnings.warn(f"gradient checkpointing was switched off: {CHECKPOINTING_IS_IN_VAIN}", stacklevel=4)
        if state is not None:
            return
