"""What a probe knows of one trained parameter."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ...kernels.table import TensorTable
from ..offload import Home
from ..parameters import Piece, Slot
from ..sharding import gather, is_sharded, local_of
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


@dataclasses.dataclass(frozen=True)
class Part:
    """What goes with a block of a weight, of what every process has whole.

    Attributes:
        v: the block's columns of V, contiguous, a copy where those are not all; None for a dense parameter.
        b: the block's rows of B, a view.
        piece: the block.
    """

    v: Tensor | None
    b: Tensor
    piece: Piece

    def follow(self, v: Tensor | None) -> None:
        """Takes over its columns of a new V, (batch, rank, cols) fp16."""
        if v is not None and self.v is not None:
            self.v.copy_(_columns(v, self.piece))


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
        factors: V and B of a single matrix as (rank, cols) and (rows, rank), which layers ask for all the time; of what this
            process has of it.
        in_blocks: this process has a block of it all the time (tensor parallel).
        part: what goes with that block.
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
    in_blocks: bool = False
    part: Part | None = None

    @property
    def name(self) -> str:
        """Canonical name."""
        return self.slot.name

    @property
    def within_reach(self) -> bool:
        """Whether this process can read and write what it has of the weight at any time."""
        return self.slot.out_of_reach is None or self.in_blocks

    @property
    def present(self) -> Sequence[Tensor]:
        """The parameter where it has storage now, or this process's block of it, tied ones in each place: one that is offloaded or
        sharded by FSDP only while its module runs.

        Raises:
            RuntimeError: no module that holds it runs.
        """
        if self.slot.out_of_reach is None:
            return [self.slot.parameter]
        if self.in_blocks:
            return [local_of(self.slot.parameter)]
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


def part_of(member: Member, piece: Piece) -> Part:
    """What goes with a block of a member's weight, on the member's device."""
    assert member.b is not None
    batch, rows, cols = piece.x.shape
    if member.v is None:
        return Part(None, member.b[..., piece.col_offset : piece.col_offset + cols], piece)
    matrices = slice(piece.first_matrix, piece.first_matrix + batch)
    first = piece.row_offset - piece.first_matrix * member.extent[1]
    return Part(_columns(member.v, piece).contiguous(), member.b[matrices, first : first + rows], piece)


def _columns(v: Tensor, piece: Piece) -> Tensor:
    batch, _, cols = piece.x.shape
    return v[piece.first_matrix : piece.first_matrix + batch, :, piece.col_offset : piece.col_offset + cols]


def table_of(members: Sequence[Member], xs: Sequence[Tensor], parts: Sequence[Part | None]) -> TensorTable:
    """Weights of members of one kind, as (batch, rows, cols) on their device, with V and what was learned.

    Args:
        xs: whole weights, or blocks of them; ``parts``: what goes with each block, None for a whole weight.
    """
    vs, learned, rows, columns, widths = [], [], [], [], []
    for member, x, part in zip(members, xs, parts, strict=True):
        v, b = (member.v, member.b) if part is None else (part.v, part.b)
        vs += [] if v is None else [v]
        learned += [] if b is None else [b.view(x.shape) if v is None else b]
        rows.append(0 if part is None else part.piece.row_offset)
        columns.append(0 if part is None else part.piece.col_offset)
        widths.append(x.shape[-1] if part is None else part.piece.global_cols)
    ids = [m.slot.tensor_id for m in members]
    return TensorTable(xs, ids, v=vs or None, n=learned or None, row_offsets=rows, col_offsets=columns, global_cols=widths)


def gains_of(members: Sequence[Member]) -> Tensor | None:
    """(members,) fp32, what weight decay has made of the weights, or None if none decayed."""
    if all(m.gain is None for m in members):
        return None
    return torch.cat([torch.ones(1, device=m.device) if m.gain is None else m.gain for m in members])


def execution_device(holders: list[Holder]) -> torch.device:
    """Where the modules that hold an offloaded weight run."""
    return next(holder.home.execution_device for holder in holders if holder.home is not None)


def load_weight(member: Member, device: torch.device) -> Tensor:
    """An offloaded or sharded weight of its parameter's shape and dtype, contiguous; in memory of the device it is not copied.

    A sharded one is gathered, which every process has to take part in.
    """
    if member.slot.out_of_reach == "sharded":
        return gather(member.slot.parameter).detach().to(device).contiguous()
    weight = _resident(member)
    if weight is None:
        weight = _homes(member)[0].load()
    return weight.detach().to(device, member.slot.parameter.dtype).contiguous()


@contextlib.contextmanager
def offloaded_weight(member: Member, device: torch.device) -> Iterator[Tensor]:
    """An offloaded weight as (batch, rows, cols) on a device, written back to where it is kept, tied ones to every place once.

    :meth:`lozo_kernels.model.offload.Home.store` says what becomes of files. If the body raises, what is on disk stays as it was.
    """
    weight = load_weight(member, device)
    yield member.slot.matrices(weight)
    resident = _resident(member)
    if resident is not None and resident.data_ptr() != weight.data_ptr():
        resident.detach().copy_(weight)
    for home in _homes(member):
        home.store(weight)


def _homes(member: Member) -> list[Home]:
    """The places where the weight is kept, each once."""
    return list({holder.home.place: holder.home for holder in member.holders if holder.home is not None}.values())


def _resident(member: Member) -> Tensor | None:
    """The parameter of a module that always has it, where it is tied to one that does not."""
    held = (holder.module._parameters[holder.attribute] for holder in member.holders if holder.home is None)
    return next(held, None)


def scopes_of(members: Sequence[Member]) -> dict[nn.Module, list[Member]]:
    """The members that are swapped in during each module's forward."""
    scopes: dict[nn.Module, list[Member]] = {}
    for member in members:
        if member.side in ("scratch", "copy"):
            for module in member.scopes:
                scopes.setdefault(module, []).append(member)
    return scopes
