"""The state of one trained parameter under a probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.table import TensorTable
from ..layout import Shard
from ..parameters import Parameter
from .runtime import PointTensors


@dataclasses.dataclass(eq=False)
class Past:
    """What a weight that cannot be merged learned in earlier windows: its delta is ``b @ v``.

    Attributes:
        b: (rows, all ranks) fp32; v: (all ranks, cols) fp32.
        window: the last one in them.
    """

    b: Tensor
    v: Tensor
    window: int

    def add(self, b: Tensor, v: Tensor, window: int) -> None:
        """Adds what was learned in a window: b (rows, rank), v (rank, cols) fp32. More of the last window adds no rank."""
        if window == self.window:
            self.b[:, -b.shape[1] :] += b
        else:
            self.b, self.v, self.window = torch.cat((self.b, b), 1), torch.cat((self.v, v)), window

    def to(self, device: torch.device) -> None:
        self.b, self.v = self.b.to(device), self.v.to(device)


@dataclasses.dataclass(frozen=True)
class ShardFactors:
    """The parts of factors that belong to a shard of a weight. Every process has the factors whole.

    Attributes:
        v: the shard's columns of V, contiguous (a copy unless they are all columns); None for a dense parameter.
        b: the shard's rows of B, a view.
        shard: the shard.
    """

    v: Tensor | None
    b: Tensor
    shard: Shard

    def follow(self, v: Tensor | None) -> None:
        """Copies the shard's columns of a new V, (batch, rank, cols) fp16."""
        if v is not None and self.v is not None:
            self.v.copy_(_columns(v, self.shard))


@dataclasses.dataclass(eq=False)
class Member:
    """One trained parameter under a probe.

    Attributes:
        parameter: the parameter; index: its position among all trained ones.
        extent: (batch, rows, cols).
        device: the device of its state.
        v: V of the window, transposed, (batch, rank, cols) fp16; None for a dense parameter.
        signed: it has a direction for each part of a batch (GRZO), which only the activation side can evaluate.
        b: what was learned since the last merge, fp32: the factor B (batch, rows, rank), or (1, 1, elements) for a dense
            parameter; None if updates go straight to the weight (MeZO, GRZO, and side "inplace").
        gain: (1,) fp32, the factor by which weight decay scaled the weight since the last merge, or None without decay.
        side: "activation", "shift" (a bias of a layer on the activation side), "scratch", "copy" or "inplace"; None before
            :meth:`ProbeHandle.prepare`.
        reason: why that side was chosen.
        scopes: the modules during whose forward a perturbed weight replaces the parameter.
        enabled: a check perturbs this parameter. All are, except while a difference is being traced.
        swapped: a perturbed weight replaces the parameter now.
        buffers: perturbed weights of the parameter's shape, one for each evaluation (side "copy").
        shift: (groups, elements) fp32 (side "shift").
        past: earlier windows, if the weight cannot be merged.
        layer_weight: the weight of its layer, if it is a bias on the side "shift".
        point: the points on its device.
        factors: V and B of a single matrix as (rank, cols) and (rows, rank), which layers read all the time; in blocks, the parts
            that belong to this process's block.
        local: the parts of V and B for the block that this process has all the time (tensor parallel).
    """

    parameter: Parameter
    index: int
    extent: tuple[int, int, int]
    device: torch.device
    signed: bool = False
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
    point: PointTensors | None = None
    factors: tuple[Tensor, Tensor] | None = None
    local: ShardFactors | None = None

    def __post_init__(self) -> None:
        self.name, self.storage = self.parameter.name, self.parameter.storage
        self.owners = self.storage.owners

    def settle_on(self, side: str, reason: str) -> None:
        """Sets the side, and the reason for it. Raises RuntimeError if a weight that cannot be moved is put in place, or one that
        has a direction for each example on another side than "activation"."""
        if self.signed and side != "activation":
            raise RuntimeError(f"{self.name!r} cannot have a direction for each example ({reason}): exclude it, or use LOZO")
        if side == "inplace" and not self.storage.resident:
            raise RuntimeError(f"{self.name!r} is {self.storage.word} and cannot be probed ({reason}): exclude it")
        self.side, self.reason = side, reason

    @property
    def numel(self) -> int:
        batch, rows, cols = self.extent
        return batch * rows * cols


def factors_of(member: Member, shard: Shard) -> ShardFactors:
    """Returns the parts of V and B that belong to a shard of a member's weight, on the member's device."""
    assert member.b is not None
    batch, rows, cols = shard.x.shape
    if member.v is None:
        return ShardFactors(None, member.b[..., shard.col_offset : shard.col_offset + cols], shard)
    matrices = slice(shard.first_matrix, shard.first_matrix + batch)
    first = shard.row_offset - shard.first_matrix * member.extent[1]
    return ShardFactors(_columns(member.v, shard).contiguous(), member.b[matrices, first : first + rows], shard)


def _columns(v: Tensor, shard: Shard) -> Tensor:
    batch, _, cols = shard.x.shape
    return v[shard.first_matrix : shard.first_matrix + batch, :, shard.col_offset : shard.col_offset + cols]


def table_of(members: Sequence[Member], shards: Sequence[Shard]) -> TensorTable:
    """Makes a table of the weights of members of one kind, on their device, with V and what was learned.

    Args:
        shards: the weights, whole or this process's part of them.
    """
    vs, learned = [], []
    for member, shard in zip(members, shards, strict=True):
        whole = shard.x.shape == member.extent or (member.v is None and shard.x.numel() == member.numel)
        v, b = member.v, member.b
        if not whole:
            local = member.local if member.local is not None else factors_of(member, shard)
            v, b = local.v, local.b
        vs += [] if v is None else [v]
        learned += [] if b is None else [b.view(shard.x.shape) if v is None else b]
    return TensorTable(
        [shard.x for shard in shards],
        [m.parameter.tensor_id for m in members],
        v=vs or None,
        n=learned or None,
        row_offsets=[shard.row_offset for shard in shards],
        col_offsets=[shard.col_offset for shard in shards],
        global_cols=[shard.global_cols for shard in shards],
    )


def gains_of(members: Sequence[Member]) -> Tensor | None:
    """The factors by which weight decay scaled the weights since the last merge, (members,) fp32, or None if none decayed."""
    if all(m.gain is None for m in members):
        return None
    return torch.cat([torch.ones(1, dtype=torch.float32, device=m.device) if m.gain is None else m.gain for m in members])


def modules_of(member: Member) -> set[nn.Module]:
    """The modules that have a member's parameter, and those that run with its perturbed weight."""
    return {*member.scopes, *(owner.module for owner in member.owners)}


def scopes_of(members: Sequence[Member]) -> dict[nn.Module, list[Member]]:
    """For each module, the members whose perturbed weights are swapped in while it runs."""
    scopes: dict[nn.Module, list[Member]] = {}
    for member in members:
        if member.side in ("scratch", "copy"):
            for module in member.scopes:
                scopes.setdefault(module, []).append(member)
    return scopes
