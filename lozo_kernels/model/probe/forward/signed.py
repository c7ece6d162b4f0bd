"""The activation side of GRZO: each part of a batch is moved along its own direction diag(r_i) U V^T diag(s_i).

Signs are of the inputs and the outputs: x_i W^T + eps ((x_i o s_i) V) (U o r_i)^T. Products with signs are exact, and those with
U and V are torch's, as bounded as the layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels import noise, ops
from ....kernels.calls import Draw
from ..members import Member
from ..runtime import Runtime
from .activation import Layer


class PartSigns:
    """The signs of all matrices at the current point. Those of a step are made at once, as one by one would take longer."""

    def __init__(self, runtime: Runtime, members: Sequence[Member]) -> None:
        self._runtime = runtime
        self._members = [member for member in members if member.signed]
        self._made: dict[torch.device, tuple[object, dict[Member, tuple[Tensor, Tensor]]]] = {}

    def of(self, member: Member) -> tuple[Tensor, Tensor]:
        """Returns r, (parts, rows), and s, (parts, columns), of a matrix: fp32, 1 and -1."""
        point, parts = self._runtime.points[0], self._runtime.parts
        key = (point.step, point.direction, parts)
        made = self._made.get(member.device)
        if made is None or made[0] != key:
            made = self._made[member.device] = key, self._make(member.device)
        _, rows, cols = member.extent
        r, s = made[1][member]
        return noise.unpack_signs(r, 0, rows), noise.unpack_signs(s, 0, cols)

    def _make(self, device: torch.device) -> dict[Member, tuple[Tensor, Tensor]]:
        """The words of the signs of all matrices on a device."""
        some = [member for member in self._members if member.device == device]
        places = [
            (member.parameter.tensor_id, stream, 0, count)
            for member in some
            for stream, count in (("row signs", member.extent[1]), ("column signs", member.extent[2]))
        ]
        point = self._runtime.points[0]
        words = noise.sign_words(
            self._runtime.seed, places, point.step, self._runtime.parts, direction=point.direction, device=device
        )
        pieces = words.split([4 * noise.sign_counters(0, count) for *_, count in places], 1)
        return dict(zip(some, zip(pieces[0::2], pieces[1::2], strict=True), strict=True))


class SignedLayer(Layer):
    """A layer whose weight has a direction for each part of a batch."""

    def __init__(self, *what: Any, signs: PartSigns) -> None:
        super().__init__(*what)
        self.signs = signs

    def add(self, y: Tensor, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise NotImplementedError("directions per example (GRZO) are not for compiled models: leave torch.compile out")
        runtime, shift = self.runtime, self._shift
        if self.member.enabled and runtime.points[0].scale:
            if runtime.parts > 1 and runtime.is_shared(self.name, x.shape):
                x, y = x.expand(runtime.whole, *x.shape[1:]), y.expand(runtime.whole, *y.shape[1:])
            with torch.autocast(y.device.type, enabled=False):
                y = self._moved(y, x)
        return y if shift is None else y + shift[0].to(y.dtype)

    def _moved(self, y: Tensor, x: Tensor) -> Tensor:
        """Returns y + scale * (x o s_i) V (U o r_i)^T of each part, with the sides of the matrix as the layer uses it."""
        member, parts = self.member, self.runtime.parts
        assert member.v is not None and member.point is not None
        _, rows, _ = member.extent
        rank, seed, step = member.v.shape[1], self.runtime.seed, Draw(self.runtime.points[0].step)
        u = ops.factor(seed, rows, rank, self.tensor_id, step, device=member.device, backend=self.backend)
        r, s = self.signs.of(member)
        v = member.v[0].float() * s.unsqueeze(1)  # (parts, rank, columns)
        if self.kind == "embedding":
            looked_up = x.reshape(parts, -1).long()
            inner, outer = u[looked_up] * r.gather(1, looked_up).unsqueeze(-1), v
        else:
            u = u * r.unsqueeze(-1)  # (parts, rows, rank)
            given, outer = (u, v) if self.kind == "transposed" else (v.transpose(1, 2), u.transpose(1, 2))
            inner = torch.bmm(x.reshape(parts, -1, x.shape[-1]).float(), given)
        moved = torch.baddbmm(y.reshape(parts, -1, y.shape[-1]).float(), inner * member.point.scales, outer)
        return moved.to(y.dtype).view(y.shape)
