"""What a probe knows of one trained parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..offloaded import Home
from ..parameters import Slot
from ..sharding import is_sharded
from ..table import TensorTable
from .runtime import DevicePoint


@dataclasses.dataclass(eq=False)
class Holder:
    """A module that has the parameter, and under which name; ``home`` where it is offloaded."""

    module: nn.Module
    name: str
    attribute: str
    home: Home | None = None


@dataclasses.dataclass(eq=False)
class Past:
    """Windows of a weight that cannot be merged: its delta is ``b @ v``.

    Attributes:
        b: (rows, all ranks) fp32; v: (all ranks, cols) fp32.
        window: the last of them.
    """

    b: Tensor
    v: Tensor
    window: int

    def add(self, b: Tensor, v: Tensor, window: int) -> None:
        """Takes in what was learned in a window: b (rows, rank), v (rank, cols) fp32. One that goes on adds no rank."""
        if window == self.window:
            self.b[:, -b.shape[1] :] += b
        else:
            self.b, self.v, self.window = torch.cat((self.b, b), 1), torch.cat((self.v, v)), window

    def to(self, device: torch.device) -> None:
        """Moves it."""
        self.b, self.v = self.b.to(device), self.v.to(device)


@dataclasses.dataclass(eq=False)
class Member:
    """One trained parameter under a probe.

    Attributes:
        slot: where it lives; index: its position among all trained parameters.
        extent: (batch, rows, cols).
        device: of its state.
        holders: every module that has it.
        v: V of the window, transposed, (batch, rank, cols) fp16; None for a dense parameter.
        b: what was learned since the last merge, fp32: the factor B (batch, rows, rank), or (1, 1, elements) for a dense
            parameter; None where updates go straight to the weights (MeZO).
        gain: (1,) fp32, what weight decay has made of the weight since the last merge, or None without decay.
        side: "activation", "shift" (a bias of a layer on the activation side), "scratch", "copy" or "inplace"; None before
            :meth:`ProbeHandle.prepare`.
        reason: why that side.
        scopes: the modules during whose forward a perturbed weight is in the parameter's place.
        enabled: a check looks at this parameter; all are, but while a difference is being traced.
        swapped: a perturbed weight is in its place.
        buffers: perturbed weights, one for each evaluation, of the parameter's shape ("copy").
        shift: (groups, elements) fp32 ("shift").
        past: of a weight that cannot be merged.
        layer_weight: of a bias on the activation side, the weight of its layer.
        point: the points on its device.
        factors: V and B of a single matrix as (rank, cols) and (rows, rank), which layers ask for all the time.
    """

    slot: Slot
    index: int
    extent: tuple[int, int, int]
    device: torch.device
    holders: list[Holder]
    v: Tensor | None = None
    b: Tensor | None = None
    gain: Tensor | None = None
    side: str | None = None
    reason: str = ""
    scopes: list[nn.Module] = dataclasses.field(default_factory=list)
    enabled: bool = True
    swapped: bool = False
    buffers: list[Tensor] = dataclasses.field(default_factory=list)
    shift: Tensor | None = None
    past: Past | None = None
    layer_weight: Member | None = None
    point: DevicePoint | None = None
    factors: tuple[Tensor, Tensor] | None = None

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.slot.name

    @property
    def present(self) -> list[nn.Parameter]:
        """The parameter where it has storage now: an offloaded or sharded one only while its module runs, tied ones in each place.

        Raises:
            RuntimeError: it is offloaded or sharded, and no module that holds it runs.
        """
        if self.slot.out_of_reach is None:
            return [self.slot.parameter]
        held = [holder.module._parameters.get(holder.attribute) for holder in self.holders]
        found = {id(p): p for p in held if p is not None and p.device.type != "meta" and not is_sharded(p)}
        if not found:
            raise RuntimeError(f"{self.name!r} is {self.slot.out_of_reach}, and was not brought in for the module that uses it")
        return list(found.values())

    @property
    def numel(self) -> int:
        """Elements."""
        batch, rows, cols = self.extent
        return batch * rows * cols


def table_of(members: Sequence[Member], xs: Sequence[Tensor]) -> TensorTable:
    """Weights of members of one kind, as (batch, rows, cols) on their device, with V and what was learned."""
    vs = [m.v for m in members if m.v is not None]
    learned = [m.b.view(x.shape) if m.v is None else m.b for m, x in zip(members, xs, strict=True) if m.b is not None]
    return TensorTable(xs, [m.slot.tensor_id for m in members], v=vs or None, n=learned or None)


def gains_of(members: Sequence[Member]) -> Tensor | None:
    """(members,) fp32, what weight decay has made of the weights, or None if none decayed."""
    if all(m.gain is None for m in members):
        return None
    return torch.cat([torch.ones(1, device=m.device) if m.gain is None else m.gain for m in members])
