"""The activation side: adds (B + s U) V^T to the outputs of linear and embedding layers, whose weights are only read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ....kernels import ops, skinny
from ....kernels.calls import Draw, LayerCall
from ....kernels.registry import Backend
from ...layout import Shard
from ...modules import own_parameters
from ...sharding import adds_once, arrived, is_sharded, local_inputs, local_of, local_outputs, why_not_local, with_local
from ...storage import Owner
from ..members import Member
from ..runtime import Runtime

Forward = Callable[..., Any]


def summed_dimension(kind: str) -> int:
    """The dimension of its weight that a layer of a kind sums over, or looks up."""
    return 1 if kind == "linear" else 0


def probed_forward(runtime: Runtime, layer: Layer, old: Forward) -> Forward:
    """Wraps a layer's forward, so that it adds what its weight and bias have moved by."""

    @functools.wraps(old)
    def forward(*args: Any, **kwargs: Any) -> Any:
        y = old(*args, **kwargs)
        if torch.compiler.is_compiling() or runtime.live:
            x = args[0] if args else next(iter(kwargs.values()))
            return layer.add_to_each(y, x) if y.is_nested else layer.add(y, x)
        return y

    return forward


class Layer:
    """A layer whose weight is on the activation side.

    Args:
        kind: see :func:`layer_kind`.
        member: the weight.
        bias: the bias if its side is "shift", else None.
    """

    def __init__(self, runtime: Runtime, kind: str, member: Member, bias: Member | None, owner: Owner, backend: Backend) -> None:
        self.runtime, self.kind, self.member, self.bias, self.backend = runtime, kind, member, bias, backend
        self.module, self.name = owner.module, owner.path
        self.tensor_id = member.parameter.tensor_id
        self.first_row = 0 if member.local is None else member.local.shard.row_offset
        self.adds_once = True  # this process adds what is added once to outputs that are a sum over processes

    @property
    def _in_operators(self) -> bool:
        """Whether this layer uses torch's operators instead of the ops."""
        return False

    @property
    def _shift(self) -> Tensor | None:
        bias = self.bias
        if not self.adds_once:
            return None
        return None if bias is None or bias.shift is None or not bias.enabled else self.runtime.select(bias.shift)

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns the layer's outputs at the points. Without autograd they are changed in place."""
        member, runtime = self.member, self.runtime
        if not member.enabled:
            return y if self._shift is None else y + self._shift[0].to(y.dtype)
        if runtime.groups > 1 and runtime.is_shared(self.name, x.shape):
            x, y = x.expand(runtime.whole, *x.shape[1:]), y.expand(runtime.whole, *y.shape[1:]).contiguous()
        if self._in_operators or (torch.is_grad_enabled() and (y.requires_grad or x.requires_grad)):
            return self._differentiable(y, x)
        x, y = arrived(x), arrived(y)
        if not y.is_contiguous():
            y = y.contiguous()
        flat = y.view(-1, y.shape[-1])
        if self.kind == "embedding":
            self._add_rows(self._call(flat, x.reshape(-1).contiguous()))
            return y
        rows = x.reshape(-1, x.shape[-1])
        call = self._call(flat, rows if rows.stride(1) == 1 else rows.contiguous())
        call.transposed, call.shift = self.kind == "transposed", self._shift
        skinny.dispatch(call, self.backend, lookup=False)
        if member.past is not None:
            flat += ((rows.float() @ member.past.v.T) @ member.past.b.T).to(y.dtype)
        if member.gain is not None:
            spared = self._spared_bias()
            if spared is not None:
                flat += spared.to(y.dtype)
        return y

    def add_to_each(self, y: Tensor, x: Tensor) -> Tensor:
        """As :meth:`add` for nested tensors, which ``nn.TransformerEncoder`` makes of padded batches."""
        parts = [self.add(part, rows) for part, rows in zip(y.unbind(), x.unbind(), strict=True)]
        return torch.nested.as_nested_tensor(parts, layout=y.layout)

    def _call(self, y: Tensor, x: Tensor) -> LayerCall:
        member, runtime = self.member, self.runtime
        assert member.factors is not None and member.point is not None
        v, b = member.factors
        draws, scales = member.point.draws, member.point.scales
        if runtime.selected is not None:
            draws, scales = runtime.select(draws), runtime.select(scales)
        return LayerCall(y, x, v, b, runtime.seed, self.tensor_id, self.first_row, draws, scales, gain=member.gain)

    def _add_rows(self, call: LayerCall) -> None:
        skinny.dispatch(call, self.backend, lookup=True)

    def _spared_bias(self) -> Tensor | None:
        """What outputs that were multiplied by the weight's gain lack of a bias with another gain; None if nothing."""
        b = own_parameters(self.module).get("bias")
        gain, bias = self.member.gain, self.bias
        in_shift = bias is not None and bias.storage.always_here
        if b is None or gain is None or in_shift or not self.adds_once:
            return None
        own = 1.0 if bias is None or bias.gain is None else bias.gain
        return (own - gain) * (local_of(b) if is_sharded(b) else b).float()

    def _differentiable(self, y: Tensor, x: Tensor) -> Tensor:
        """As :meth:`add`, but in operators that autograd knows, for a forward pass whose gradients are needed."""
        parts = []
        for g, (yg, xg) in enumerate(zip(y.chunk(self.runtime.groups), x.chunk(self.runtime.groups), strict=True)):
            delta = self._delta(g)
            if self.member.gain is not None:
                yg = yg * self.member.gain.to(yg.dtype)
                spared = self._spared_bias()
                yg = yg if spared is None else yg + spared.to(yg.dtype)
            if self.kind == "embedding":
                yg = yg + self._look_up(xg, delta).to(yg.dtype)
            else:
                yg = yg + F.linear(xg.float(), delta.T if self.kind == "transposed" else delta).to(yg.dtype)
            if self._shift is not None:
                yg = yg + self._shift[g].to(yg.dtype)
            parts.append(yg)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _look_up(self, rows: Tensor, delta: Tensor) -> Tensor:
        return F.embedding(rows, delta)

    def _delta(self, group: int) -> Tensor:
        """Returns (B + s U) V^T of one evaluation, fp32."""
        member, point = self.member, self.runtime.point(group)
        assert member.b is not None and member.v is not None and member.point is not None
        _, rows, _ = member.extent
        u = ops.factor(
            self.runtime.seed,
            rows,
            member.b.shape[-1],
            member.parameter.tensor_id,
            Draw(point.step, point.direction),
            device=member.device,
            backend=self.backend,
        )
        delta = (member.b[0] + self.runtime.select(member.point.scales)[group] * u) @ member.v[0].float()
        return delta if member.past is None else delta + member.past.b @ member.past.v


class _LayerInBlocks(Layer):
    """A tensor-parallel layer. Each process adds the product of its own block of the weight to its part of the outputs.

    A process with rows of the weight has the same columns of the outputs. With columns of the weight (rows of an embedding) the
    outputs are a sum over processes, and the product with the process's columns of the inputs is one term.
    """

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        p = self.member.parameter.tensor
        problem = why_not_local(p, x, y, summed_dimension(self.kind), self.kind == "embedding")
        if problem is not None:
            raise RuntimeError(
                f"layer {self.name!r} computes in another way than when its side was chosen ({problem}): patch with "
                f"side={{{self.member.name!r}: 'scratch'}}"
            )
        self.adds_once, outputs = adds_once(y), local_outputs(y)
        added = super().add(outputs, local_inputs(p, x))
        return y if added is outputs else with_local(y, added)

    @property
    def _shard(self) -> Shard:
        assert self.member.local is not None
        return self.member.local.shard

    @property
    def _in_operators(self) -> bool:
        return not self._shard.x.numel()

    def _delta(self, group: int) -> Tensor:
        shard = self._shard
        _, rows, cols = shard.x.shape
        return super()._delta(group)[shard.row_offset : shard.row_offset + rows, shard.col_offset : shard.col_offset + cols]

    def _add_rows(self, call: LayerCall) -> None:
        here, mine = self._rows_here(call.x)
        if here is None:
            super()._add_rows(call)
            return
        y, gain = call.y, call.gain
        call.y, call.x, call.gain = torch.zeros_like(y), mine, None
        super()._add_rows(call)
        if gain is not None:
            y *= gain.to(y.dtype)
        y += call.y * here[:, None]

    def _look_up(self, rows: Tensor, delta: Tensor) -> Tensor:
        here, mine = self._rows_here(rows)
        if here is None:
            return super()._look_up(rows, delta)
        return F.embedding(mine, delta) * here[..., None] if len(delta) else torch.zeros((), dtype=delta.dtype, device=delta.device)

    def _rows_here(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """Which of the looked-up rows of the weight are in the block (None: all), and their indices in it (0 for the others)."""
        first, count = self._shard.row_offset, self._shard.x.shape[1]
        if count == self.member.extent[1]:
            return None, rows
        here = (rows >= first) & (rows < first + count)
        return here, torch.where(here, rows - first, 0)


def layer_of(runtime: Runtime, kind: str, member: Member, bias: Member | None, owner: Owner, backend: Backend) -> Layer:
    """The layer for a weight that is here whole, or in blocks. Arguments as :class:`Layer`."""
    return (_LayerInBlocks if member.storage.in_blocks else Layer)(runtime, kind, member, bias, owner, backend)
