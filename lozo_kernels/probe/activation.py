"""The activation side: what (B + s U) V^T adds to the outputs of linear and embedding layers, whose weights stay as they are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops, skinny
from ..parameters import is_quantised
from ..registry import Backend, Draw
from .members import Holder, Member
from .runtime import Runtime

Forward = Callable[..., Any]


def layer_kind(holder: Holder) -> str | None:
    """How a module uses a matrix that it holds: "linear", "transposed" or "embedding", or None where that is not known."""
    module, attribute = holder.module, holder.attribute
    if attribute != "weight":
        return None
    forward = type(module).forward
    if forward is nn.Linear.forward or is_quantised(module, module._parameters["weight"]):  # type: ignore[arg-type]
        return "linear"
    if forward is nn.Embedding.forward:
        return "embedding" if module.max_norm is None else None
    if type(module).__module__ == "transformers.pytorch_utils" and type(module).__name__ == "Conv1D":
        return "transposed"
    return None


def probed_forward(
    runtime: Runtime, kind: str, member: Member, bias: Member | None, holder: Holder, backend: Backend, old: Forward
) -> Forward:
    """A layer's forward with what its weight and bias have moved by.

    Args:
        kind: see :func:`layer_kind`.
        member: the weight, on the activation side.
        bias: the bias where its side is "shift", or None.
    """
    layer = _Layer(runtime, kind, member, bias, holder, backend)

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        y = old(*args, **kwargs)
        if torch.compiler.is_compiling() or runtime.live:
            return layer.add(y, args[0] if args else next(iter(kwargs.values())))
        return y

    return forward


class _Layer:
    def __init__(self, runtime: Runtime, kind: str, member: Member, bias: Member | None, holder: Holder, backend: Backend) -> None:
        self.runtime, self.kind, self.member, self.bias, self.holder, self.backend = runtime, kind, member, bias, holder, backend
        self.noise = {"seed": runtime.seed, "tensor_id": member.slot.tensor_id, "backend": backend}

    @property
    def _shift(self) -> Tensor | None:
        bias = self.bias
        return None if bias is None or bias.shift is None or not bias.enabled else self.runtime.select(bias.shift)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's outputs at the points; in place, but for autograd."""
        member, runtime = self.member, self.runtime
        if not member.enabled:
            return y if self._shift is None else y + self._shift[0].to(y.dtype)
        if runtime.groups > 1 and runtime.is_shared(self.holder.name, x.shape):
            x, y = x.expand(runtime.whole, *x.shape[1:]), y.expand(runtime.whole, *y.shape[1:]).contiguous()
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad):
            return self._differentiable(y, x)
        if not y.is_contiguous():
            y = y.contiguous()
        assert member.factors is not None and member.point is not None
        v, b = member.factors
        draws, scales = member.point.draws, member.point.scales
        if runtime.selected is not None:
            draws, scales = runtime.select(draws), runtime.select(scales)
        noise: dict[str, Any] = {"draws": draws, "scales": scales, "gain": member.gain, **self.noise}
        flat = y.view(-1, y.shape[-1])
        if self.kind == "embedding":
            skinny.lowrank_embedding_(flat, x.reshape(-1).contiguous(), v, b, **noise)
        else:
            rows = x.reshape(-1, x.shape[-1])
            skinny.lowrank_linear_(
                flat,
                rows if rows.stride(1) == 1 else rows.contiguous(),
                v,
                b,
                transposed=self.kind == "transposed",
                shift=self._shift,
                **noise,
            )
            if member.past is not None:
                flat += ((rows.float() @ member.past.v.T) @ member.past.b.T).to(y.dtype)
            spared = self._spared_bias()
            if spared is not None:
                flat += spared.to(y.dtype)
        return y

    def _spared_bias(self) -> Tensor | None:
        """What outputs that were multiplied by the weight's gain lack of a bias that does not decay with the weight."""
        b = self.holder.module._parameters.get("bias")
        gain, bias = self.member.gain, self.bias
        if b is None or gain is None or (bias is not None and bias.slot.out_of_reach is None):  # within reach: in the shift
            return None
        own = 1.0 if bias is None or bias.gain is None else bias.gain
        return (own - gain) * b.float()

    def _differentiable(self, y: Tensor, x: Tensor) -> Tensor:
        """As :meth:`add`, in operators that autograd knows, for a forward pass that someone wants gradients of."""
        parts = []
        for g, (yg, xg) in enumerate(zip(y.chunk(self.runtime.groups), x.chunk(self.runtime.groups), strict=True)):
            delta = self._delta(g)
            if self.member.gain is not None:
                yg = yg * self.member.gain.to(yg.dtype)
                spared = self._spared_bias()
                yg = yg if spared is None else yg + spared.to(yg.dtype)
            if self.kind == "embedding":
                yg = yg + F.embedding(xg, delta).to(yg.dtype)
            else:
                yg = yg + F.linear(xg.float(), delta.T if self.kind == "transposed" else delta).to(yg.dtype)
            if self._shift is not None:
                yg = yg + self._shift[g].to(yg.dtype)
            parts.append(yg)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _delta(self, group: int) -> Tensor:
        """(B + s U) V^T of one evaluation, fp32."""
        member, point = self.member, self.runtime.point(group)
        assert member.b is not None and member.v is not None and member.point is not None
        _, rows, _ = member.extent
        u = ops.factor(
            self.runtime.seed,
            rows,
            member.b.shape[-1],
            member.slot.tensor_id,
            Draw(point.step, point.direction),
            device=member.device,
            backend=self.backend,
        )
        delta = (member.b[0] + self.runtime.select(member.point.scales)[group] * u) @ member.v[0].float()
        return delta if member.past is None else delta + member.past.b @ member.past.v
