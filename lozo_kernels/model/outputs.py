"""What a driven model returns: its loss, and outputs that nothing can be learned from."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Refusal = Callable[[Tensor], Exception]
"""Makes the error for a gradient that would be lost, from that gradient."""


def loss_of(output: Any) -> Tensor:
    """Returns the loss in a model's output. Raises TypeError if there is none."""
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


def with_loss(output: Any, loss: Tensor) -> Any:
    """Returns a model's output with another loss in it."""
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


def refuse_gradients(output: Any, refusal: Refusal) -> Any:
    """Returns an output whose values are the same, and whose floating-point tensors raise an error when they are differentiated.

    They come from evaluations without a graph, so a loss that is made from them would train nothing, without a word. Tensors that
    require a gradient already stay as they are, and so do objects other than mappings, sequences and what has a ``loss``.

    Args:
        refusal: makes the error. A gradient of zero, of a term that is multiplied by 0, is no error.
    """
    if isinstance(output, Tensor):
        if output.requires_grad or not (output.is_floating_point() or output.is_complex()):
            return output
        with torch.enable_grad():
            return _Refuse.apply(_anchor(output.device), output, refusal)
    if isinstance(output, MutableMapping):
        changed = {key: new for key, old in output.items() if (new := refuse_gradients(old, refusal)) is not old}
        if changed and type(output) is dict:  # which the model may have kept; other mappings are made for the call
            return output | changed
        for key, new in changed.items():
            output[key] = new
    elif isinstance(output, (tuple, list)):
        parts = [refuse_gradients(part, refusal) for part in output]
        if any(new is not old for new, old in zip(parts, output, strict=True)):
            return type(output)._make(parts) if hasattr(output, "_make") else type(output)(parts)  # type: ignore[attr-defined]
    elif hasattr(output, "loss") and hasattr(output, "__dict__"):
        changed = {name: new for name, old in vars(output).items() if (new := refuse_gradients(old, refusal)) is not old}
        if changed:
            output = copy.copy(output)
            vars(output).update(changed)
    return output


@functools.cache
def _anchor(device: torch.device) -> Tensor:
    """Something that requires a gradient, gets none, and is not a parameter that anybody looks at."""
    return torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)


class _Refuse(torch.autograd.Function):
    """A tensor that raises an error when something other than zero is to flow back through it."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, refusal: Refusal) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        ctx.set_materialize_grads(False)
        ctx.refusal = refusal
        return x.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, None, None]:  # type: ignore[override]
        if grad is not None and bool(grad.any()):
            raise ctx.refusal(grad)
        return None, None, None
