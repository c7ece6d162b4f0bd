"""What a probe learned since the last merge: tables over the factors, their updates, and the merge."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....kernels import ops
from ....kernels.calls import Draw, Rounding
from ....kernels.registry import Choice
from ....kernels.table import TensorTable
from ...config import PatchConfig
from ...estimators import Estimator
from ...passes import Group, Scalar, StepUpdate, Term, decay_of, share
from ..members import Member, Part, gains_of, part_of, table_of


@dataclasses.dataclass(eq=False)
class StateGroup:
    """Parameters of one kind on one device.

    Attributes:
        learned: their factors B, or for dense parameters what was added, as a table to update.
        momentum: N likewise, or None.
        windows: V and N as a table to draw V anew; None for dense parameters.
        gains: (members,) fp32, what weight decay made of the weights.
    """

    kind: str
    members: list[Member]
    learned: Group
    momentum: Group | None
    windows: TensorTable | None
    gains: Tensor
    choice: Choice


def make_groups(
    members: Sequence[Member], momentum: Mapping[str, Tensor], choices: Mapping[torch.device, Choice], estimator: Estimator
) -> list[StateGroup]:
    """Members that learn in factors, by kind and device."""
    by_place: dict[tuple[str, torch.device], list[Member]] = {}
    for member in members:
        if member.b is not None:
            by_place.setdefault((member.slot.kind, member.device), []).append(member)
    return [_make_group(kind, some, momentum, choices[device], estimator) for (kind, device), some in by_place.items()]


def _make_group(
    kind: str, members: list[Member], momentum: Mapping[str, Tensor], choice: Choice, estimator: Estimator
) -> StateGroup:
    index = torch.tensor([m.index for m in members], device=members[0].device)
    ids = [m.slot.tensor_id for m in members]
    bs = [m.b for m in members if m.b is not None]
    ns = [momentum[m.name] for m in members] if momentum else None
    gains = torch.ones(len(members), dtype=torch.float32, device=members[0].device)
    for i, member in enumerate(members):
        if member.gain is not None:
            gains[i] = member.gain[0]
        member.gain = gains[i : i + 1] if member.gain is not None else None
    if kind == "dense":
        learned = Group(kind, index, TensorTable(bs, ids, n=ns), choice, estimator)
        return StateGroup(kind, members, learned, None, None, gains, choice)
    windows = TensorTable(
        # Only shapes count: drawing V does not touch the weights, which may be out of reach.
        [torch.empty(1, device=m.device).expand(m.extent) for m in members],
        ids,
        v=[m.v for m in members if m.v is not None],
        n=ns,
        checked=True,
    )
    learned = Group(kind, index, TensorTable(bs, ids), choice, estimator)
    carried = Group(kind, index, TensorTable(ns, ids), choice, estimator) if ns else None
    return StateGroup(kind, members, learned, carried, windows, gains, choice)


def update_factors(group: StateGroup, update: StepUpdate, config: PatchConfig) -> None:
    """B <- (1 - lr * weight_decay) B - lr * mean of c U / r; with momentum N <- beta N + (1 - beta) mean of c U, N in its place.

    X_t = gain * W + B V^T then follows Algorithm 1 (or 2) of the paper exactly, and gain takes its decay too.
    """
    learned, low_rank = group.learned, group.kind == "lowrank"
    factor = config.update_factor if low_rank else 1.0
    draws = learned.draws([Term(Draw(update.step, d)) for d in range(len(update.c))])
    shares = [share(c, len(update.c)) for c in update.c]
    whole_decay = decay_of(update.lr, update.weight_decay)
    decay = None if whole_decay is None else learned.select(whole_decay)
    for first in range(0, len(draws), ops.MAX_DRAWS):
        chunk, some = draws[first : first + ops.MAX_DRAWS], shares[first : first + ops.MAX_DRAWS]
        last = first + len(chunk) == len(draws)
        keep = decay if first == 0 else None
        if update.beta is None:
            scales = learned.stack([learned.select(s * -update.lr * factor) for s in some])
            step = learned.estimator.factor_update_ if low_rank else functools.partial(ops.dense_update_, seed=config.seed)
            step(learned.table, draws=chunk, scales=scales, decay=keep, backend=group.choice.backend)
            continue
        beta = update.beta if first == 0 else 1.0
        coefficients = learned.stack([learned.select((1.0 - update.beta) * s) for s in some])
        if not low_rank:
            ops.dense_momentum_(
                learned.table,
                seed=config.seed,
                draws=chunk,
                scales=0.0,
                coefficients=coefficients,
                alpha=learned.select(-update.lr if last else 0.0 * update.lr),
                beta=learned.select(beta),
                decay=keep,
                backend=group.choice.backend,
            )
            continue
        assert group.momentum is not None
        learned.estimator.factor_update_(
            group.momentum.table,
            draws=chunk,
            scales=coefficients,
            decay=learned.select(beta),
            backend=group.choice.backend,
        )
        if last:
            _follow_momentum(group, learned.select(update.lr * -factor), decay)
    if decay is not None:
        group.gains *= decay
        for i, member in enumerate(group.members):
            member.gain = group.gains[i : i + 1]


def _follow_momentum(group: StateGroup, alpha: Scalar, decay: Scalar | None) -> None:
    """B <- decay * B + alpha * N, each operation rounded."""
    assert group.momentum is not None
    count = len(group.members)
    alphas = _each(alpha, count)
    decays = [None] * count if decay is None else _each(decay, count)
    for b, n, a, d in zip(group.learned.table.x, group.momentum.table.x, alphas, decays, strict=True):
        if d is not None:
            b.mul_(d)
        b.add_(n * a)


def _each(value: Scalar, count: int) -> list[Scalar]:
    return list(value.expand(count).unbind()) if isinstance(value, Tensor) else [value] * count


def merge_weights(
    group: StateGroup,
    xs: Sequence[Tensor],
    members: Sequence[Member],
    parts: Sequence[Part | None],
    seed: int,
    rounding: Rounding | None,
) -> None:
    """X <- gain * X + B V^T (or + what was added), rounded once into the weights' dtype.

    Args:
        xs: the weights of ``members`` as (batch, rows, cols), on the group's device, or blocks of them with their ``parts``: a
            block has the bits of the whole weight.
    """
    merge = ops.dense_merge_ if group.kind == "dense" else ops.lowrank_merge_
    table = table_of(members, xs, parts)
    merge(table, seed=seed, decay=gains_of(members), rounding=rounding, backend=group.choice.backend)


def merge_shard(group: StateGroup, member: Member, seed: int, rounding: Rounding | None) -> None:
    """As :func:`merge_weights`, of what this process has of a weight that FSDP shards, on the CPU perhaps, which may be nothing."""
    piece = member.slot.piece()
    if not piece.x.numel():
        return
    weight = piece.x.to(member.device)
    merge_weights(group, [weight], [member], [part_of(member, piece)], seed, rounding)
    if weight.data_ptr() != piece.x.data_ptr():
        piece.x.copy_(weight)
