"""What a probe learned since the last merge: tables over the factors, their updates, and the merge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.calls import Rounding, TableCall
from ....kernels.op_table import OPS
from ....kernels.registry import Backend
from ....kernels.table import TensorTable
from ...config import PatchConfig
from ...estimators import Estimator
from ...layout import Shard
from ...passes import Carried, Group, Scalar, Term, Update, decay_of, run_update
from ..members import Member, gains_of, table_of


@dataclasses.dataclass(eq=False)
class FactorGroup(Group):
    """Factors B of low-rank parameters, with their N. A pass adds U to B where it would add U V^T to weights."""

    def apply(
        self,
        terms: Sequence[Term],
        *,
        decay: Scalar | None = None,
        decayed: Scalar | None = None,  # noqa: ARG002  (B holds no perturbation that could decay)
        carried: Carried | None = None,
        rounding: Rounding | None = None,  # noqa: ARG002  (B is fp32)
        seed: int | None = None,
    ) -> None:
        """B <- decay * B + the terms. With ``carried`` momentum, N takes up the terms, and B <- decay * B + alpha * N."""
        draws, keep = self.draws(terms), None if decay is None else self.row(decay)
        scales = self.rows([0.0 if carried else term.gradient * self.update_factor for term in terms])
        call = TableCall(self.config.seed if seed is None else seed, draws, scales, keep)
        if carried is None:
            self.run(OPS["factor_update_"], call)
            return
        call.coefficients = self.rows([term.coefficient for term in terms])
        call.alpha, call.beta = self.row(carried.alpha * self.update_factor), self.row(carried.beta)
        self.run(OPS["factor_momentum_"], call)


@dataclasses.dataclass(eq=False)
class StateGroup:
    """The members of one kind on one device, with what they learned.

    Attributes:
        learned: their factors B, or for dense parameters the sum of their updates.
        windows: a table with V and N for drawing V anew; None for dense parameters.
        gains: (members,) fp32, the factors by which weight decay scaled the weights.
    """

    members: list[Member]
    learned: Group
    windows: TensorTable | None
    gains: Tensor
    _merged: tuple[list[Any], TensorTable] | None = dataclasses.field(default=None, init=False)

    @property
    def backend(self) -> Backend:
        """The backend of the device."""
        return self.learned.backend

    def update(self, update: Update) -> None:
        """B <- (1 - lr * weight_decay) B - lr * mean of c U / r; with momentum, N takes up the mean and replaces it.

        X_t = gain * W + B V^T then follows Algorithm 1 (or 2) of the paper exactly, because the gain decays too.
        """
        run_update([self.learned], update)
        decay = decay_of(update.lr, update.weight_decay)
        if decay is not None:
            self.gains *= self.learned.row(decay)
            self.note_decay()

    def note_decay(self) -> None:
        """Lets members have their gains, because weights decayed."""
        for i, member in enumerate(self.members):
            member.gain = self.gains[i : i + 1]

    def merge(self, members: Sequence[Member], shards: Sequence[Shard], rounding: Rounding | None) -> None:
        """X <- gain * X + B V^T (for dense parameters + the sum of their updates), rounded once into the weights' dtype.

        Args:
            members: some of the group's.
            shards: this process's part of their weights, on the group's device: a shard has the bits of the whole weight.
        """
        dense = self.learned.kind == "dense"
        table = self._table_for(members, shards)
        table.check_positions(factors=not dense, flat=dense or rounding is not None)
        nothing = torch.empty(0, len(members), dtype=torch.float32, device=table.device)
        call = TableCall(self.learned.config.seed, (), nothing, gains_of(members), rounding)
        ops.dispatch(OPS["dense_merge_" if dense else "lowrank_merge_"], table, call, self.backend)

    def _table_for(self, members: Sequence[Member], shards: Sequence[Shard]) -> TensorTable:
        """The table of a merge. Where all weights are always here it is kept for the next window."""
        found = [(s.x.data_ptr(), s.x.shape, s.x.stride(), s.x.dtype) for s in shards]
        if self._merged is not None and self._merged[0] == found:
            return self._merged[1]
        table = table_of(members, shards)
        if all(member.storage.always_here for member in members):
            self._merged = found, table
        return table


def make_groups(
    members: Sequence[Member],
    momentum: Mapping[str, Tensor],
    backends: Mapping[torch.device, Backend],
    estimator: Estimator,
    config: PatchConfig,
) -> list[StateGroup]:
    """Groups the members that learn in factors by kind and device."""
    by_place: dict[tuple[str, torch.device], list[Member]] = {}
    for member in members:
        if member.b is not None:
            by_place.setdefault((member.parameter.kind, member.device), []).append(member)
    return [_make_group(kind, some, momentum, backends[device], estimator, config) for (kind, device), some in by_place.items()]


def _make_group(
    kind: str, members: list[Member], momentum: Mapping[str, Tensor], backend: Backend, estimator: Estimator, config: PatchConfig
) -> StateGroup:
    device, ids = members[0].device, [m.parameter.tensor_id for m in members]
    index = torch.tensor([m.index for m in members], device=device, dtype=torch.int64)
    bs = [m.b for m in members if m.b is not None]
    ns = [momentum[m.name] for m in members] if momentum else None
    gains = torch.ones(len(members), dtype=torch.float32, device=device)
    for i, member in enumerate(members):
        if member.gain is not None:
            gains[i] = member.gain[0]
            member.gain = gains[i : i + 1]
    learned: Group
    if kind == "dense":
        learned = Group(kind, index, TensorTable(bs, ids, n=ns), backend, estimator, config)
        learned.rounds = False  # updates add to fp32, which does not round
        return StateGroup(members, learned, None, gains)
    windows = TensorTable(
        # Only shapes count: drawing V does not touch the weights, which may be elsewhere.
        [torch.empty(1, dtype=torch.float32, device=m.device).expand(m.extent) for m in members],
        ids,
        v=[m.v for m in members if m.v is not None],
        n=ns,
        checked=True,
    )
    learned = FactorGroup(kind, index, TensorTable(bs, ids, n=ns), backend, estimator, config)
    learned.rounds = False
    return StateGroup(members, learned, windows, gains)
