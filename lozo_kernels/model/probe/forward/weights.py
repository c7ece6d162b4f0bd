"""Perturbed weights in memory of their own: copies and shifts that follow the points, and scratch that is filled on demand."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.registry import Backend, Choice
from ....kernels.table import TensorTable
from ...estimators import Estimator
from ..members import Member, gains_of, table_of
from ..runtime import Runtime


@dataclasses.dataclass
class _Batch:
    """Members of one kind on one device whose perturbed weights are made by one call; a table to write for every point."""

    members: list[Member]
    table: TensorTable
    outs: list[TensorTable]
    low_rank: bool
    backend: Backend


class PerturbedWeights:
    """Writes perturbed weights at the runtime's points."""

    def __init__(self, runtime: Runtime, seed: int) -> None:
        self._runtime, self._seed = runtime, seed
        self._estimator: Estimator
        self._batches: list[_Batch] = []
        self._most = 1  # points at once so far: there is memory for as many
        self._members: list[Member] = []
        self._choices: Mapping[torch.device, Choice] = {}
        self._fills: dict[Member, tuple[tuple[int, int], TensorTable, TensorTable]] = {}

    def rebuild(self, members: Sequence[Member], choices: Mapping[torch.device, Choice], estimator: Estimator) -> None:
        """Starts anew: weights or sides changed, or there are more points than ever."""
        self._members, self._choices, self._estimator = list(members), choices, estimator
        self._fills.clear()
        self._batches.clear()
        groups = self._most = max(self._most, self._runtime.groups)
        batches: dict[tuple[torch.device, str, str], list[Member]] = {}
        for member in members:
            if member.side in ("copy", "shift"):
                batches.setdefault((member.device, member.slot.kind, member.side), []).append(member)
        for (device, kind, side), some in batches.items():
            make = self._shifts if side == "shift" else self._copies
            table, outs = make(some, groups)
            self._batches.append(_Batch(some, table, outs, kind == "lowrank", choices[device].backend))

    def refresh(self) -> None:
        """Copies and shifts at the points as they are now."""
        if self._runtime.groups > self._most:
            self.rebuild(self._members, self._choices, self._estimator)
        for batch in self._batches:
            for g, out in enumerate(batch.outs[: self._runtime.groups]):
                gains = None if batch.members[0].side == "shift" else gains_of(batch.members)
                self._merge(batch.table, out, g, batch.low_rank, gains, batch.backend)
            if batch.members[0].side == "shift":
                _add_decayed_biases(batch.members)

    def fill(self, member: Member, out: Tensor, group: int, backend: Backend, base: Tensor | None = None) -> None:
        """The perturbed weight of a member at a point, into a tensor of its shape.

        Args:
            base: the whole weight; None: what this process has of it, where it is now.
        """
        part = member.part if base is None else None
        if base is None:
            base = member.present[0].detach()
        key = (base.data_ptr(), out.data_ptr())
        known = self._fills.get(member)
        if known is None or known[0] != key:
            table = table_of([member], [member.slot.matrices(base)], [part])
            known = (key, table, TensorTable([member.slot.matrices(out)], [0]))
            if member.within_reach and base.numel():  # a table keeps its tensors alive, and an offloaded weight is to go
                self._fills[member] = known
        self._merge(known[1], known[2], group, member.v is not None, member.gain, backend)

    def _merge(
        self, table: TensorTable, out: TensorTable, group: int, low_rank: bool, gains: Tensor | None, backend: Backend
    ) -> None:
        runtime = self._runtime
        scale: float | Tensor = runtime.points[group].scale
        if low_rank:
            scale = runtime.on(table.device).scales[group : group + 1].view(1, 1)
        merge = self._estimator.lowrank_merge_ if low_rank else functools.partial(ops.dense_merge_, seed=self._seed)
        merge(table, draws=runtime.draws(group), scales=scale, decay=gains, out=out, backend=backend)

    def _copies(self, members: Sequence[Member], groups: int) -> tuple[TensorTable, list[TensorTable]]:
        for member in members:
            p = member.present[0]
            if len(member.buffers) != groups or member.buffers[0].device != p.device or member.buffers[0].dtype != p.dtype:
                member.buffers = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for _ in range(groups)]
        outs = [TensorTable([m.slot.matrices(m.buffers[g]) for m in members], [0] * len(members)) for g in range(groups)]
        return table_of(members, [m.slot.piece().x for m in members], [m.part for m in members]), outs

    def _shifts(self, members: Sequence[Member], groups: int) -> tuple[TensorTable, list[TensorTable]]:
        learned = [m.b if m.part is None else m.part.b for m in members]
        for member, b in zip(members, learned, strict=True):
            assert b is not None
            if member.shift is None or len(member.shift) != groups or member.shift.device != member.device:
                member.shift = torch.empty(groups, b.numel(), device=member.device)
        outs = []
        for g in range(groups):
            rows = [m.shift[g].view(1, 1, -1) for m in members if m.shift is not None]
            outs.append(TensorTable(rows, [0] * len(rows)))
        first = [0 if m.part is None else m.part.piece.col_offset for m in members]
        ids, widths = [m.slot.tensor_id for m in members], [m.numel for m in members]
        return TensorTable([b for b in learned if b is not None], ids, col_offsets=first, global_cols=widths), outs


def _add_decayed_biases(members: Sequence[Member]) -> None:
    """A layer's outputs hold the bias at rest, times the weight's gain: what is missing where the bias has another."""
    for member in members:
        weight = member.layer_weight
        if weight is None or (weight.gain is None and member.gain is None):
            continue
        if member.shift is None or not member.within_reach:
            continue
        one = torch.ones(1, device=member.device)
        difference = (one if member.gain is None else member.gain) - (one if weight.gain is None else weight.gain)
        member.shift += difference * member.present[0].detach().float().flatten()
