"""What a probe knows of one trained parameter."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..parameters import Slot
from .runtime import DevicePoint


@dataclasses.dataclass(eq=False)
class Holder:
    """A module that has the parameter, and under which name."""

    module: nn.Module
    name: str
    attribute: str


@dataclasses.dataclass(eq=False)
class Past:
    """Windows of a weight that cannot be merged: its delta is ``b @ v``, b (rows, all ranks) fp32, v (all ranks, cols) fp32."""

    b: Tensor
    v: Tensor


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
        partners: of a bias on the activation side, the weight of its layer.
        point: the points on its device.
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
    partners: list[Member] = dataclasses.field(default_factory=list)
    point: DevicePoint | None = None

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.slot.name

    @property
    def numel(self) -> int:
        """Elements."""
        batch, rows, cols = self.extent
        return batch * rows * cols
