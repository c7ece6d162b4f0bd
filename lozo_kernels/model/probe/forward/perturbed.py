"""Writes perturbed weights to other memory: copies and shifts that follow the points, and scratch memory on demand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.calls import TableCall
from ....kernels.op_table import OPS
from ....kernels.registry import Backend
from ....kernels.table import TensorTable
from ...estimators import Estimator
from ...layout import Shard
from ..members import Member, gains_of, table_of
from ..runtime import Runtime


@dataclasses.dataclass
class _Batch:
    """Members of one kind on one device whose perturbed weights one call writes, with a table of outputs for every point."""

    members: list[Member]
    table: TensorTable
    outs: list[TensorTable]
    backend: Backend


class PerturbedWeights:
    """Writes perturbed weights at the runtime's points."""

    def __init__(self, runtime: Runtime, estimator: Estimator) -> None:
        self._runtime, self._estimator = runtime, estimator
        self._batches: list[_Batch] = []
        self._most = 1  # the most points at once so far, for which there is memory
        self._members: list[Member] = []
        self._backends: Mapping[torch.device, Backend] = {}
        self._fills: dict[Member, tuple[tuple[int, int], TensorTable, TensorTable]] = {}

    def rebuild(self, members: Sequence[Member], backends: Mapping[torch.device, Backend]) -> None:
        """Makes tables and memory anew, because weights or sides changed, or there are more points than ever."""
        self._members, self._backends = list(members), backends
        self._fills.clear()
        self._batches.clear()
        groups = self._most = max(self._most, self._runtime.groups)
        batches: dict[tuple[torch.device, str, str], list[Member]] = {}
        for member in members:
            if member.side in ("copy", "shift"):
                batches.setdefault((member.device, member.parameter.kind, member.side), []).append(member)
        for (device, _, side), some in batches.items():
            make = self._shifts if side == "shift" else self._copies
            table, outs = make(some, groups)
            low_rank = some[0].v is not None
            table.check_positions(factors=low_rank, flat=not low_rank)
            self._batches.append(_Batch(some, table, outs, backends[device]))

    @property
    def tables(self) -> list[object]:
        """The tables that are in use now."""
        return [*self._batches, *self._fills.values()]

    def refresh(self) -> None:
        """Rewrites copies and shifts for the current points."""
        if self._runtime.groups > self._most:
            self.rebuild(self._members, self._backends)
        for batch in self._batches:
            shifts = batch.members[0].side == "shift"
            for g, out in enumerate(batch.outs[: self._runtime.groups]):
                self._merge(batch.table, out, g, None if shifts else gains_of(batch.members), batch.backend)
            if shifts:
                _add_decayed_biases(batch.members)

    def fill(self, member: Member, out: Tensor, group: int, base: Tensor | None = None, *, keep: bool = True) -> None:
        """Writes the perturbed weight of a member at a point into a tensor of its shape.

        A weight that is not always here lies elsewhere every time. It is copied to ``out``, and perturbed there.

        Args:
            base: the whole weight; None: this process's part of it, where it is now.
            keep: tables are kept for the next call, since ``out`` will be the same memory.
        """
        if member.signed and self._runtime.parts > 1:
            raise RuntimeError(
                f"{member.name!r} is used in a way that no evaluation before showed, which cannot be done for each example: "
                "exclude it"
            )
        local = member.local if base is None else None
        if base is None:
            base = member.storage.present()[0].detach()
        if keep and not member.storage.always_here:  # a table keeps its tensors alive, and this one has to go
            base = out.copy_(base)
        key = (base.data_ptr(), out.data_ptr())
        known = self._fills.get(member)
        if known is None or known[0] != key:
            matrices = member.parameter.layout.matrices
            x = matrices(base)
            shard = Shard(x, 0, 0, x.shape[2]) if local is None else dataclasses.replace(local.shard, x=x)
            table = table_of([member], [shard])
            table.check_positions(factors=member.v is not None, flat=member.v is None)
            known = (key, table, table if base is out else _outputs(table, [out]))
            if keep and base.numel():
                self._fills[member] = known
        self._merge(known[1], known[2], group, member.gain, self._backends[member.device])

    def _merge(self, table: TensorTable, out: TensorTable, group: int, gains: Tensor | None, backend: Backend) -> None:
        runtime, count = self._runtime, len(table)
        draws, point = runtime.draws(group, dense=table.v is None), runtime.points[group]
        op = OPS["dense_merge_" if table.v is None else "lowrank_merge_"]
        if table.v is None:
            scales = torch.full((len(draws), count), point.scale, dtype=torch.float32, device=table.device)
            run: Callable[..., None] = ops.dispatch
            law = self._estimator.config.directions_law
        else:
            scales = runtime.on(table.device).scales[group : group + 1].view(1, 1).expand(len(draws), count).contiguous()
            run, law = self._estimator.run, "normal"
        run(op, table, TableCall(runtime.seed, draws, scales, gains, out=out, law=law), backend)

    def _copies(self, members: Sequence[Member], groups: int) -> tuple[TensorTable, list[TensorTable]]:
        for member in members:
            p = member.storage.present()[0]
            if len(member.buffers) != groups or member.buffers[0].device != p.device or member.buffers[0].dtype != p.dtype:
                member.buffers = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for _ in range(groups)]
        table = table_of(members, [m.storage.shard() for m in members])
        return table, [_outputs(table, [m.buffers[g] for m in members]) for g in range(groups)]

    def _shifts(self, members: Sequence[Member], groups: int) -> tuple[TensorTable, list[TensorTable]]:
        learned = [m.b if m.local is None else m.local.b for m in members]
        for member, b in zip(members, learned, strict=True):
            assert b is not None
            if member.shift is None or len(member.shift) != groups or member.shift.device != member.device:
                member.shift = torch.empty(groups, b.numel(), dtype=torch.float32, device=member.device)
        outs = []
        for g in range(groups):
            rows = [m.shift[g].view(1, 1, -1) for m in members if m.shift is not None]
            outs.append(TensorTable(rows, [0] * len(rows)))
        first = [0 if m.local is None else m.local.shard.col_offset for m in members]
        ids, widths = [m.parameter.tensor_id for m in members], [m.numel for m in members]
        return TensorTable([b for b in learned if b is not None], ids, col_offsets=first, global_cols=widths), outs


def _outputs(table: TensorTable, outs: Sequence[Tensor]) -> TensorTable:
    """A table of tensors to write in place of those of another table, seen as the same matrices: a vector whose elements are not
    side by side is seen as a column."""
    return TensorTable([out.view(x.shape) for out, x in zip(outs, table.x, strict=True)], [0] * len(outs))


def _add_decayed_biases(members: Sequence[Member]) -> None:
    """Adds what is missing of biases whose decay is not their layer's: outputs hold the stored bias times the weight's gain."""
    for member in members:
        weight = member.layer_weight
        if weight is None or (weight.gain is None and member.gain is None):
            continue
        if member.shift is None or not member.storage.always_here:
            continue
        one = torch.ones(1, dtype=torch.float32, device=member.device)
        difference = (one if member.gain is None else member.gain) - (one if weight.gain is None else weight.gain)
        member.shift += difference * member.storage.present()[0].detach().float().flatten()
